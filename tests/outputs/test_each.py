"""Several adapters merged into one base in one pass, and what they share."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import Run
from support.tiny_models import Pair, save_adapter, tiny_llama
from transformers import AutoModelForCausalLM

from converters import Weighted, load_adapter, merge, merge_each
from converters.errors import OptionError
from converters.files.reader import TensorReader

TARGETS = {"gsm8k": ["q_proj", "v_proj"], "code": ["up_proj"], "style": ["q_proj", "down_proj"]}


@pytest.fixture
def adapters(pair: Pair) -> list[Path]:
    """Three, which touch different weights of the base; one has a head."""
    folders = []
    for seed, (name, targets) in enumerate(TARGETS.items()):
        folders.append(pair.base.parent / name)
        saved = ["lm_head"] if name == "style" else None
        save_adapter(tiny_llama().from_pretrained(pair.base), folders[-1], seed, target_modules=targets,
                     modules_to_save=saved)  # fmt: skip
    return folders


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_output_is_what_a_merge_alone_writes(pair: Pair, adapters: list[Path]) -> None:
    results = merge_each(pair.base, adapters, pair.output, max_shard_size="30KB", dtype="bf16")
    assert [result.output.name for result in results] == list(TARGETS)
    for adapter, result in zip(adapters, results, strict=True):
        alone = merge(pair.base, adapter, pair.base.parent / "alone", max_shard_size="30KB", dtype="bf16",
                      overwrite=True)  # fmt: skip
        assert files(result.output) == files(alone.output)
        assert result.verification == alone.verification
    assert sorted(path.name for path in pair.output.iterdir()) == sorted(TARGETS)


def test_the_base_is_read_as_often_for_three_as_for_one(
    pair: Pair, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    right = TensorReader._read

    def count(self: TensorReader, info: object, start: int, size: int) -> torch.Tensor:
        if info.file.parent == pair.base:
            read.append(size)
        return right(self, info, start, size)

    monkeypatch.setattr(TensorReader, "_read", count)
    merge(pair.base, pair.adapter, pair.output, verify=False)
    one = sum(read)
    read.clear()
    save_adapter(tiny_llama(), pair.base.parent / "second", 7)  # on the same weights
    several = [pair.adapter, pair.base.parent / "second", Weighted(load_adapter(adapters[0]), 0.5)]
    merge_each(pair.base, several, pair.output.with_name("all"), verify=False)
    assert sum(read) == one


def test_shared_tensors_are_one_file(pair: Pair, adapters: list[Path]) -> None:
    results = merge_each(pair.base, adapters, pair.output, share=True)
    places: dict[tuple[int, int], set[str]] = {}
    for result in results:
        for path in result.output.glob("*.safetensors"):
            inode = (path.stat().st_dev, path.stat().st_ino)
            places.setdefault(inode, set()).update(load_file(path))
    shared = {inode: names for inode, names in places.items() if _path_of(inode, results).stat().st_nlink == 3}
    assert len(shared) == 1
    (names,) = shared.values()
    assert "model.embed_tokens.weight" in names
    assert "model.layers.0.self_attn.o_proj.weight" in names
    assert not any(kind in name for name in names for kind in ("q_proj", "v_proj", "up_proj", "down_proj", "lm_head"))
    for adapter, result in zip(adapters, results, strict=True):
        alone = merge(pair.base, adapter, pair.base.parent / "alone", overwrite=True)
        wanted = AutoModelForCausalLM.from_pretrained(alone.output).state_dict()
        found = AutoModelForCausalLM.from_pretrained(result.output).state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    hashes = [json.loads((r.output / "peanut_manifest.json").read_text())["tensors"] for r in results]
    assert len({table["model.embed_tokens.weight"]["xxh3_128"] for table in hashes}) == 1


def _path_of(inode: tuple[int, int], results: list) -> Path:
    paths = [path for result in results for path in result.output.glob("*.safetensors")]
    return next(path for path in paths if (path.stat().st_dev, path.stat().st_ino) == inode)


@pytest.mark.parametrize("share", [True, False])
def test_a_file_of_the_base_that_nobody_changes(pair: Pair, share: bool) -> None:
    """Copied whole, or a link to it."""
    model = tiny_llama().from_pretrained(pair.base)
    model.save_pretrained(pair.base, max_shard_size="20KB")
    (pair.base / "model.safetensors").unlink()
    result = merge(pair.base, pair.adapter, pair.output, max_shard_size="base", share=share)
    index = json.loads((pair.base / "model.safetensors.index.json").read_text())["weight_map"]
    untouched = set(index.values()) - {file for name, file in index.items() if "q_proj" in name or "v_proj" in name}
    assert untouched
    for file in untouched:
        assert (pair.output / file).read_bytes() == (pair.base / file).read_bytes()
        assert (pair.output / file).samefile(pair.base / file) == share
    assert result.verification is not None
    whole = merge(pair.base, pair.adapter, pair.base.parent / "whole")
    wanted, found = (AutoModelForCausalLM.from_pretrained(r.output).state_dict() for r in (whole, result))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_names(pair: Pair, adapters: list[Path], run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair.base.parent)
    asked = [part for adapter in adapters[:2] for part in ("--adapter", adapter)]
    done = run_here("peanut-merge", "--base", pair.base, *asked, "--each", "--json")
    assert [Path(result["output"]).name for result in json.loads(done.stdout)] == ["base-gsm8k", "base-code"]
    assert (pair.base.parent / "base-code" / "config.json").exists()
    again = run_here("peanut-merge", "--base", pair.base, *asked, "--each")
    assert (again.returncode, "base-gsm8k exists" in again.stderr) == (1, True)
    with pytest.raises(OptionError, match=r"would both be written to .*same/gsm8k; rename one of the folders"):
        merge_each(pair.base, [adapters[0], adapters[0]], pair.base.parent / "same")
    planned = run_here("peanut-merge", "--base", pair.base, *asked, "--each", "--dry-run", "-o", "out")
    assert (planned.stdout.count("would write"), (pair.base.parent / "out").exists()) == (2, False)
    refused = run_here("peanut-merge", "--base", pair.base, *asked, "--each", "--format", "peft")
    assert "--each is for --format merged" in refused.stderr


def test_one_bad_adapter_and_nothing_is_written(
    pair: Pair, adapters: list[Path], make_pair: Callable[..., Pair]
) -> None:
    save_adapter(tiny_llama(hidden_size=48), pair.base.parent / "wide", target_modules=["q_proj"])
    done = [*adapters, pair.base.parent / "wide"]
    with pytest.raises(Exception, match=r"this is another base, or another model size"):
        merge_each(pair.base, done, pair.output)
    assert not pair.output.exists()
