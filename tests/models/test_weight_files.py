"""Which files of a folder are the weights, where there are several, none, or some are missing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import Pair, tiny_llama

from converters import open_checkpoint, prepare_merge
from converters.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


@pytest.mark.parametrize("beside", ["pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors"])
def test_other_files_beside_the_weights_are_left_alone(pair: Pair, beside: str) -> None:
    before = open_checkpoint(pair.base).fingerprint
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, pair.base / beside)
    assert open_checkpoint(pair.base).fingerprint == before
    prepare_merge(pair.base, pair.adapter)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.fp16.safetensors", r"only as the variant 'fp16' \(model.fp16.safetensors\).*without '.fp16'"),
        ("model.bf16-00001-of-00002.safetensors", "only as the variant 'bf16'"),
        ("model.safetensors.index.fp16.json", "only as the variant 'fp16'"),
        ("consolidated.safetensors", r"in the form of its maker's own code \(consolidated.safetensors\), expected"),
        ("consolidated.00.pth", "in the form of its maker's own code"),
        ("pytorch_model.bin", r"as pickles \(pytorch_model.bin\), expected safetensors"),
        ("model-Q4_K_M.gguf", "is a GGUF for llama.cpp.*expected the safetensors checkpoint that it was made from"),
        ("tf_model.h5", "for TensorFlow"),
        ("flax_model.msgpack", "for Flax"),
    ],
)
def test_what_is_there_instead_is_named(pair: Pair, name: str, message: str) -> None:
    (pair.base / "model.safetensors").rename(pair.base / name)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(pair.base)


def test_a_gguf_by_itself_is_named(pair: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for base in (folder, folder / "model-Q4_K_M.gguf"):
        with pytest.raises(CheckpointError, match="Q4_K_M.gguf is a GGUF for llama.cpp"):
            prepare_merge(base, pair.adapter)


def test_shards_without_their_index(sharded: Path) -> None:
    whole = open_checkpoint(sharded)
    (sharded / INDEX).unlink()
    found = open_checkpoint(sharded)
    assert (found.shards, found.fingerprint) == (whole.shards, whole.fingerprint)
    last = sharded / found.shards[-1]
    last.rename(sharded / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"the shard {last.name} is missing \(others of the .* are there\)"):
        open_checkpoint(sharded)
    (sharded / "elsewhere").rename(sharded / "model-00001-of-00077.safetensors")
    with pytest.raises(CheckpointError, match=r"holds shards of two models, of .* and of 77 files"):
        open_checkpoint(sharded)


def test_an_index_that_names_missing_shards(sharded: Path) -> None:
    first = load_file(sharded / open_checkpoint(sharded).shards[0])
    shards = open_checkpoint(sharded).shards
    for shard in shards[1:]:
        (sharded / shard).unlink()
    with pytest.raises(CheckpointError, match=rf"the shard {shards[1]} is missing and \d+ more .*names it"):
        open_checkpoint(sharded)
    save_file(first, sharded / "model.safetensors", metadata={"format": "pt"})  # a single file, but not of it all
    with pytest.raises(CheckpointError, match=r"two sets of weights: model.safetensors, .* lacks \d+ tensors"):
        open_checkpoint(sharded)


def test_a_single_file_comes_before_an_index_as_in_transformers(pair: Pair, sharded: Path) -> None:
    for file in sharded.iterdir():
        (pair.base / file.name).write_bytes(file.read_bytes())
    names = json.loads((pair.base / INDEX).read_text())["weight_map"]
    found = open_checkpoint(pair.base)
    assert found.shards == ("model.safetensors",)
    assert found.tensors.keys() == names.keys()
