"""A classifier in the real vLLM: an adapter without a LoRA form, approximated, and the head that comes with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import OFTConfig
from support.engines.serving import environment
from support.peft_methods import reloaded, train
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from converters import prepare_merge
from converters.outputs.lora import LoraOptions, plan_lora_adapter, write_lora_adapter

PROMPTS = [list(range(2, 14)), list(range(40, 60)), [7, 5, 3]]

# vLLM starts processes, which would import a test module again
SCRIPT = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM
    from vllm.lora.request import LoRARequest
    base, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    llm = LLM(base, runner="pooling", dtype="float32", max_model_len=64, enable_lora=True, max_lora_rank=64,
              skip_tokenizer_init=True)
    texts = [{"prompt_token_ids": tokens} for tokens in prompts]
    for request in (None, LoRARequest("approximated", 1, adapter)):
        found = llm.classify(texts, lora_request=request, use_tqdm=False)
        print("FOUND", json.dumps([one.outputs.probs for one in found]))
"""


def tiny_qwen2() -> Qwen2ForSequenceClassification:
    torch.manual_seed(3)
    config = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=96, initializer_range=0.2, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForSequenceClassification(config)


def probabilities(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([tokens])).logits[0] for tokens in PROMPTS]
    return torch.stack(rows).float().softmax(-1)


@pytest.mark.vllm
def test_vllm_serves_an_approximation_with_its_head(tmp_path: Path) -> None:
    base, adapter, lora = tmp_path / "base", tmp_path / "adapter", tmp_path / "lora"
    targets = ["q_proj", "v_proj", "down_proj"]
    config = OFTConfig(oft_block_size=8, target_modules=targets, task_type="SEQ_CLS", modules_to_save=["score"])
    train(tiny_qwen2(), config, base, adapter)
    options = LoraOptions(rank=56, max_error=0.2, runtime="vllm")
    check = write_lora_adapter(plan_lora_adapter(prepare_merge(base, adapter), lora, options=options))
    assert check.approximation is not None
    assert check.approximation.error > 0.001
    script = tmp_path / "classify.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, base, lora, json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        cwd=tmp_path,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == 2, done.stderr[-2000:]
    plain, adapted = (torch.tensor(json.loads(line.removeprefix("FOUND "))) for line in lines)
    assert (plain - probabilities(Qwen2ForSequenceClassification.from_pretrained(base).eval())).abs().max() <= 1e-3
    assert (adapted - probabilities(reloaded(tiny_qwen2(), base, lora))).abs().max() <= 1e-3
    assert (adapted - plain).abs().max() > 0.05
