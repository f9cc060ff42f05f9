"""Evaluating adapters for a server: on the right base and in the right version, or an error that explains why not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.golden import GLUE
from support.tiny_models import Pair, edit_weights, save_adapter, tiny_llama

from converters.errors import AdapterError, CheckpointError, ConversionError, OptionError
from peanut_serve import LoraRequests
from peanut_serve.lora.cache import LoraCache
from peanut_serve.lora.exporter import LoraExporter
from peanut_serve.variants.roots import AdapterRoots, VariantSource


@pytest.fixture
def roots(pair: Pair, tmp_path: Path) -> AdapterRoots:
    shutil.copytree(pair.adapter, tmp_path / "tasks" / "one")
    save_adapter(tiny_llama(), tmp_path / "tasks" / "two", seed=5)
    return AdapterRoots([tmp_path / "tasks"])


@pytest.fixture
def exporter(pair: Pair, tmp_path: Path) -> LoraExporter:
    return LoraExporter(str(pair.base), LoraCache(tmp_path / "cache", 10**9))


def find(roots: AdapterRoots, name: str) -> VariantSource:
    source = roots.find(name)
    assert source is not None
    return source


def double_norm(state: dict[str, torch.Tensor]) -> None:
    state["model.norm.weight"].mul_(2)


def test_content_is_identity(exporter: LoraExporter, roots: AdapterRoots, pair: Pair, tmp_path: Path) -> None:
    one, two = (exporter.export(find(roots, name)) for name in ("one", "two"))
    assert (one.r, one.kinds) == (4, {"q_proj", "v_proj"})
    shutil.copytree(tmp_path / "tasks" / "one", tmp_path / "tasks" / "copy")
    digests = [one.digest, two.digest]
    assert exporter.export(find(roots, "copy")).digest == one.digest
    half = LoraExporter(str(pair.base), LoraCache(tmp_path / "cache", 10**9), dtype="bf16")
    digests.append(half.export(find(roots, "one")).digest)
    edit_weights(pair.base / "model.safetensors", double_norm)
    other = LoraExporter(str(pair.base), LoraCache(tmp_path / "cache", 10**9))
    digests.append(other.export(find(roots, "one")).digest)
    assert len(set(digests)) == 4
    with pytest.raises(CheckpointError, match="changed while"):
        exporter.export(find(roots, "one"))  # the files are not those it opened


def test_an_adapter_that_changes_meanwhile(
    exporter: LoraExporter, roots: AdapterRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that is read while it is being copied is never returned."""
    source = find(roots, "one")
    config = source.spec / "adapter_config.json"
    load, times = exporter._export, []

    def changed(times_to_change: int) -> Callable[..., object]:
        def export(*arguments: object) -> object:
            found = load(*arguments)
            if len(times) < times_to_change:
                config.write_text(config.read_text() + " ")
            times.append(found)
            return found

        return export

    monkeypatch.setattr(exporter, "_export", changed(1))
    assert exporter.export(source).state == source.state()
    assert len(times) == 2
    times.clear()
    monkeypatch.setattr(exporter, "_export", changed(99))
    with pytest.raises(AdapterError, match="the files of one are being written; try again when they are complete"):
        exporter.export(source)


def test_an_adapter_without_its_scale(tmp_path: Path) -> None:
    case = GLUE / "peanut_l_scale0.1"
    (tmp_path / "tasks").mkdir()
    shutil.copy(case / "theta.safetensors", tmp_path / "tasks" / "mrpc.safetensors")
    exporter = LoraExporter(str(case / "base"), LoraCache(tmp_path / "cache", 10**9))
    with pytest.raises(AdapterError, match="convert it once with peanut-merge --format peft --scaling S"):
        exporter.export(find(AdapterRoots([tmp_path / "tasks"]), "mrpc"))


def test_what_vllm_does_not_load_is_not_exported(exporter: LoraExporter, roots: AdapterRoots, tmp_path: Path) -> None:
    """PEFT loads it, so that `--format lora` writes it."""
    save_adapter(tiny_llama(), tmp_path / "tasks" / "head", modules_to_save=["lm_head"])
    save_adapter(tiny_llama(), tmp_path / "tasks" / "large", r=513)
    for name, reason in (
        ("head", "replaces the module lm_head; .*classifier or score; merge it"),
        ("large", "rank is 513"),
    ):
        with pytest.raises(ConversionError, match=reason):
            exporter.export(find(roots, name))


def test_requests_for_an_offline_engine(
    pair: Pair, roots: AdapterRoots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEANUT_CACHE", str(tmp_path / "cache"))
    tasks = LoraRequests(pair.base, tmp_path / "tasks")
    one, two = tasks.get("one"), tasks.get("two")
    assert [one.lora_int_id, two.lora_int_id, tasks.get("one").lora_int_id] == [1, 2, 1]
    assert (one.lora_name, Path(one.lora_path).is_dir()) == ("one", True)
    shutil.copy(tmp_path / "tasks" / "two" / "adapter_model.safetensors", tmp_path / "tasks" / "one")
    changed = tasks.get("one")
    assert changed.lora_path == two.lora_path != one.lora_path
    assert load_file(Path(one.lora_path) / "adapter_model.safetensors")  # kept: it may be in use
    with pytest.raises(OptionError, match="there is no adapter three; the available adapters are one, two"):
        tasks.get("three")
