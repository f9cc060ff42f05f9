"""No output loses a module to another of the same name: adapters with a module per expert, in every format."""

from pathlib import Path

import pytest
import torch
from support.tiny_models import edit_weights, save_per_expert, tiny_mixtral

from converters import load_adapter, merge, prepare_merge
from converters.errors import ConversionError, TargetError
from converters.files.header import read_header
from converters.models.one_name import name_each
from converters.outputs.base import OutputRequest
from converters.outputs.table import FORMATS
from peanut_serve.lora.cache import LoraCache
from peanut_serve.lora.exporter import LoraExporter
from peanut_serve.variants.roots import VariantSource


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    tiny_mixtral().save_pretrained(folder / "base")
    for method in ("lora", "peanut"):
        save_per_expert(folder / "base", folder / method, method)
    return folder


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ConversionError, match="a and b would both be x in the output"):
        name_each([("x", "a", 1), ("x", "b", 2)], "the output")
    assert name_each([("x", "a", 1), ("y", "b", 2)], "the output") == {"x": 1, "y": 2}


@pytest.mark.parametrize("method", ["lora", "peanut"])
@pytest.mark.parametrize("name", FORMATS)
def test_no_format_loses_an_expert(name: str, method: str, experts: Path, tmp_path: Path) -> None:
    """Each writes all of them, or refuses to write any."""
    plan = prepare_merge(experts / "base", experts / method, dtype="fp32")
    modules = load_adapter(experts / method).modules
    if name == "merged":
        assert sum(len(tensor.terms) for tensor in plan.tensors) == len(modules)
        return
    if name == "lora":
        assert len(FORMATS[name].load().plan([plan], OutputRequest(output=tmp_path / "out")).modules) == len(modules)
        return
    with pytest.raises(ConversionError):
        FORMATS[name].load().plan([plan], OutputRequest(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_server_loses_no_expert(experts: Path, tmp_path: Path) -> None:
    exporter = LoraExporter(str(experts / "base"), LoraCache(tmp_path / "cache", 1 << 30))
    exported = exporter.export(VariantSource("peanut", experts / "peanut"))
    found = read_header(exported.lease.folder / "adapter_model.safetensors")[0]
    modules = load_adapter(experts / "peanut").modules
    assert {info.name for info in found} == {f"base_model.model.{m}.lora_{x}.weight" for m in modules for x in "AB"}
    assert exported.kinds == {"q_proj", "experts"}  # vLLM has one layer for all of them


def test_a_module_under_two_names_is_refused(experts: Path, tmp_path: Path) -> None:
    """PEFT would load one of the two."""
    save_per_expert(experts / "base", tmp_path / "adapter", "lora", only="q_proj")
    file = tmp_path / "adapter" / "adapter_model.safetensors"

    def copy(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return weights | {name.replace("model.model.", "model."): one.clone() for name, one in weights.items()}

    edit_weights(file, copy)
    with pytest.raises(TargetError, match=r"are both model\.layers\.0\.self_attn\.q_proj\.weight of the base"):
        merge(experts / "base", tmp_path / "adapter", tmp_path / "merged")
