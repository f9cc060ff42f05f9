"""A Hub on loopback with two models, and no waits for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub.server import Hub, serve_hub
from support.tiny_models import Pair, tiny_llama


@pytest.fixture
def hub(pair: Pair, tmp_path: Path) -> Iterator[Hub]:
    tiny_llama().from_pretrained(pair.base).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for folder in (pair.base, tmp_path / "sharded"):
        (folder / "pytorch_model.bin").write_bytes(b"x" * 100)
        (folder / "model.onnx").write_bytes(b"x" * 100)
        (folder / "README.md").write_text("# model")
        (folder / "tokenizer.json").write_text("{}")
    with serve_hub({"org/single": pair.base, "org/sharded": tmp_path / "sharded"}) as hub:
        yield hub


@pytest.fixture
def no_waits(tmp_path: Path) -> dict[str, str]:
    """Settings for a process of its own: huggingface_hub sleeps for seconds between its attempts."""
    folder = tmp_path / "no_waits"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    return {"PYTHONPATH": str(folder)}
