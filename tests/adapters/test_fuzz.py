"""Whatever a folder holds: it is merged, or refused by an error of ours that leaves nothing behind. No tracebacks."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.golden import GLUE, LLM, VISION
from support.native_variants import MODULE, tiny_weights, variants
from support.paths import DATA

from converters import load_adapter, merge, save_adapter
from converters.adapters.layouts.names import LAYOUT_SUMMARIES
from converters.errors import PeanutError

pytestmark = pytest.mark.slow  # a hundred damaged adapters for each property

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    [
        "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "peanut_config.json",
        "peanut_theta.safetensors", "pytorch_model.bin", "model.safetensors", "config.json", "labels.json",
        "peanut_base.json",
    ]
)  # fmt: skip
CONFIG_KEYS = st.sampled_from(
    [
        "peft_type", "r", "depth", "act_fn", "scaling", "lora_alpha", "bias", "target_modules", "modules_to_save",
        "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "exclude_modules", "layers_to_transform",
        "layers_pattern", "base_model_name_or_path", "auto_mapping", "task_type", "modules", "labels", "format",
        "init_lora_weights", "revision", "use_dora", "id2label", "architectures",
    ]
)  # fmt: skip
PIECES = st.sampled_from(
    [
        "A", "B", "lora_A", "lora_B", "peanut_A", "peanut_encoders", "encoders", "decoders", "0", "1", "i1", "weight",
        "bias", "q_adapter", "v_adapter", "adapter", "default", "base_layer", "modules_to_save", "original_module",
        "module", "base_model", "model", "layers", "classifier", "self", "theta", "saved", "lora_embedding_A", "",
    ]
)  # fmt: skip


def native(folder: Path) -> Path:
    save_adapter(folder / "adapter", {MODULE: variants()["deep"][0]}, saved={"model.norm.weight": torch.ones(32)})
    return folder / "adapter"


def copied(source: Path) -> Callable[[Path], Path]:
    def copy(folder: Path) -> Path:
        if source.is_dir():
            return Path(shutil.copytree(source, folder / "adapter"))
        (folder / "adapter").mkdir()
        shutil.copy(source, folder / "adapter")
        return folder / "adapter"

    return copy


SOURCES: dict[str, tuple[Callable[[Path], Path], Path | None]] = {
    "llm": (copied(LLM / "gqa" / "adapter"), LLM / "gqa" / "base"),
    "vision": (copied(VISION / "naive_depth6_qv" / "theta.safetensors"), VISION / "naive_depth6_qv" / "base"),
    "whole": (copied(VISION / "vanilla_qvmlp" / "full_state_dict.bin"), VISION / "vanilla_qvmlp" / "base"),
    "glue": (copied(GLUE / "peanut_l_scale0.1" / "theta.safetensors"), GLUE / "peanut_l_scale0.1" / "base"),
    "peft": (copied(DATA / "vit-tiny" / "digits5to9"), DATA / "vit-tiny" / "base"),
    "native": (native, None),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of the native adapter."""
    from support.tiny_models import tiny_llama

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder)
    assert torch.equal(
        load_file(folder / "model.safetensors")[f"{MODULE}.weight"], tiny_weights()[f"{MODULE}.weight"]
    )
    return folder


def merged_or_refused(folder: Path, base: Path, adapter: Path, **options: Any) -> bool:
    """Merge; whether it was accepted. Anything but our own errors, or a half-done folder, fails the test."""
    before = sorted(folder.rglob("*"))
    try:
        merge(base, adapter, folder / "merged", **options)
    except PeanutError as error:
        assert str(error)
        assert sorted(folder.rglob("*")) == before
        return False
    tensors = load_file(folder / "merged" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    return True


def weights_in(adapter: Path) -> Path:
    return next(path for path in adapter.iterdir() if path.suffix in (".safetensors", ".bin"))


@pytest.mark.parametrize("source", SOURCES)
@given(data=st.data())
def test_spoilt_adapters(source: str, llama: Path, data: st.DataObject) -> None:
    make, base = SOURCES[source]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = make(folder)
        spoil = data.draw(st.sampled_from([config_of, keys_of, shapes_of, bytes_of]))
        spoil(adapter, data)
        layout = data.draw(st.none() | st.sampled_from(sorted(LAYOUT_SUMMARIES)))
        scaling = data.draw(st.sampled_from([None, 0.1, 0.0, float("inf")]))
        merged_or_refused(folder, base or llama, adapter, layout=layout, scaling=scaling)


def config_of(adapter: Path, data: st.DataObject) -> None:
    """Another value in a config, or another config."""
    found = sorted(path.name for path in adapter.glob("*.json"))
    name = data.draw(st.sampled_from(found) if found else NAMES)
    file = adapter / name
    config = json.loads(file.read_text()) if file.exists() and file.suffix == ".json" else {}
    changes = data.draw(st.dictionaries(CONFIG_KEYS | st.sampled_from(sorted(config) or ["r"]), JSON, max_size=2))
    file.write_text(json.dumps(data.draw(JSON) if data.draw(st.integers(0, 9)) == 0 else {**config, **changes}))


def keys_of(adapter: Path, data: st.DataObject) -> None:
    """Keys that are renamed, dropped or made up."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for key in data.draw(st.lists(st.sampled_from(sorted(weights)), min_size=1, max_size=3, unique=True)):
            tensor = weights.pop(key)
            parts = key.split(".")
            place = data.draw(st.integers(0, len(parts)))
            how = data.draw(st.sampled_from(["drop", "insert", "replace", "remove"]))
            if how != "drop":
                stop = place + (how != "insert")
                parts[place:stop] = [] if how == "remove" else [data.draw(PIECES)]
                weights[".".join(parts)] = tensor
        return weights

    rewrite(weights_in(adapter), change)


def shapes_of(adapter: Path, data: st.DataObject) -> None:
    """A tensor of another shape or dtype."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        key = data.draw(st.sampled_from(sorted(weights)))
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 6, 7, 48]), max_size=3))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]))
        return {**weights, key: torch.ones(shape, dtype=dtype)}

    rewrite(weights_in(adapter), change)


def bytes_of(adapter: Path, data: st.DataObject) -> None:
    """A file that is cut, or has other bytes in it."""
    file = data.draw(st.sampled_from(sorted(adapter.iterdir())))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        limit = min(len(content) - 1, data.draw(st.sampled_from([50, 2000, len(content) - 1])))
        content[data.draw(st.integers(0, limit))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    if file.suffix == ".safetensors":
        save_file(change(load_file(file)), file)
    else:
        torch.save(change(torch.load(file, weights_only=True)), file)


@given(files=st.dictionaries(NAMES, st.binary(max_size=200) | JSON, max_size=4))
def test_folders_of_anything_are_refused(files: dict[str, Any], llama: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapter").mkdir()
        for file, content in files.items():
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / "adapter" / file).write_bytes(raw)
        assert not merged_or_refused(folder, llama, folder / "adapter")


@pytest.mark.parametrize("source", SOURCES)
def test_the_sources_are_right_before_they_are_spoilt(source: str, llama: Path, tmp_path: Path) -> None:
    make, base = SOURCES[source]
    adapter = make(tmp_path)
    scaling = 0.1 if source == "glue" else None
    assert load_adapter(adapter, scaling=scaling).modules
    assert merged_or_refused(tmp_path, base or llama, adapter, scaling=scaling)
