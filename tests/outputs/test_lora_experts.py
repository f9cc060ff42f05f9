"""`--format lora` for adapters with a module per expert: fused for PEFT with transformers 5, one by one for vLLM."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.tiny_models import save_per_expert, tiny_mixtral, tiny_qwen2_moe, tiny_qwen3_moe
from transformers import AutoModelForCausalLM, PreTrainedModel

from converters import merge, prepare_merge
from converters.errors import ConversionError
from converters.outputs.lora import LoraAdapterPlan, LoraOptions, plan_lora_adapter, write_lora_adapter

MODELS = {"mixtral": tiny_mixtral, "qwen2_moe": tiny_qwen2_moe, "qwen3_moe": tiny_qwen3_moe}
TOKENS = torch.arange(3, 40).view(1, -1)


def logits(model: torch.nn.Module) -> torch.Tensor:
    for module in model.modules():
        if hasattr(module, "config"):  # the grouped kernels need sizes that are multiples of 16 bytes
            module.config._experts_implementation = "eager"
    with torch.no_grad():
        return model(TOKENS).logits


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def formula(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The merged weights of a plain LoRA, as its definition has them."""
    weights, theta = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, a in theta.items():
        if "lora_A" in name:
            key = name.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[key] = weights[key] + 2.0 * theta[name.replace("lora_A", "lora_B")] @ a
    return weights


def set_up(folder: Path, name: str, method: str, only: str = "") -> None:
    MODELS[name]().save_pretrained(folder / "base")
    save_per_expert(folder / "base", folder / "adapter", method, only)


def convert(folder: Path, **options: object) -> LoraAdapterPlan:
    plan = prepare_merge(folder / "base", folder / "adapter", dtype="fp32")
    planned = plan_lora_adapter(plan, folder / "lora", options=LoraOptions(**options))
    assert write_lora_adapter(planned, device="cpu").recomputed > 0
    return planned


@pytest.mark.parametrize("method", ["lora", "peanut"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_all_experts(name: str, method: str, tmp_path: Path) -> None:
    set_up(tmp_path, name, method)
    planned = convert(tmp_path)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    if method == "lora":
        found = load_file(tmp_path / "merged" / "model.safetensors")
        wanted_weights = formula(tmp_path / "base", tmp_path / "adapter")
        assert all(torch.allclose(found[key], one, atol=1e-5) for key, one in wanted_weights.items())
    wanted, plain = logits(load(tmp_path / "merged")), logits(load(tmp_path / "base"))
    exported = logits(PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "lora"))
    assert (plain - wanted).abs().max() > 1e-2 * wanted.abs().max()
    assert (exported - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert "for vLLM, write it with runtime='vllm'" in planned.vllm_refuses[0]
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "again")  # and so does this toolkit
    assert (logits(load(tmp_path / "again")) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_peft_loads_translated_mixtral(tmp_path: Path) -> None:
    """PEFT reads the original adapter, too, and the export does what PEFT makes of that."""
    set_up(tmp_path, "mixtral", "lora")
    convert(tmp_path)
    wanted, found = (
        logits(PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / part)) for part in ("adapter", "lora")
    )
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("only", ["w2", "w3"])
def test_one_projection_of_the_experts(only: str, tmp_path: Path) -> None:
    """The others keep the base's weights; vLLM loads all experts or none."""
    set_up(tmp_path, "mixtral", "lora", only)
    convert(tmp_path)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    wanted = logits(load(tmp_path / "merged"))
    exported = logits(PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "lora"))
    assert (exported - wanted).abs().max() < 1e-4 * wanted.abs().max()
    plan = prepare_merge(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ConversionError, match=r"vLLM would refuse this LoRA adapter: it .* expert"):
        plan_lora_adapter(plan, tmp_path / "vllm", options=LoraOptions(runtime="vllm"))


@pytest.mark.parametrize("name", MODELS)
def test_vllm_gets_a_module_for_each_expert(name: str, tmp_path: Path) -> None:
    set_up(tmp_path, name, "lora")
    planned = convert(tmp_path, runtime="vllm")
    assert planned.vllm_refuses == ()
    found, given = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("lora", "adapter"))
    assert found.keys() == given.keys()
    for key in given:
        if "lora_A" in key:
            other = key.replace("lora_A", "lora_B")
            assert torch.allclose(found[other] @ found[key], 2.0 * given[other] @ given[key], atol=1e-5)


def test_an_approximation_of_experts(tmp_path: Path) -> None:
    set_up(tmp_path, "mixtral", "lora")
    planned = convert(tmp_path, rank=3, max_error=0.9)
    assert planned.r == 6  # of gate_up_proj, which joins two
