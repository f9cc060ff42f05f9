"""Experts that a checkpoint stores with in and out swapped: Qwen3-VL-MoE's on the Hub, (experts, in, out)."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny_models import edit_weights
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from converters import merge, prepare_merge
from converters.errors import BaseMismatchError, ConversionError
from converters.outputs.checkpoint.recheck import check_against
from converters.outputs.lora import plan_lora_adapter, write_lora_adapter

TOKENS = torch.arange(3, 40).view(1, -1)
EXPERTS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


def tiny_model(inner: int) -> Qwen3VLMoeForConditionalGeneration:
    text = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "vocab_size": 61, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": inner,
        "intermediate_size": 18, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def set_up(folder: Path, on_hub: bool, inner: int = 10) -> None:
    """A base as the Hub or as transformers stores it, and a LoRA on its experts with random factors."""
    model = tiny_model(inner)
    model.save_pretrained(folder / "base")

    def swap(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t.mT.contiguous() if name.endswith(EXPERTS) else t for name, t in weights.items()}

    if on_hub:
        edit_weights(folder / "base" / "model.safetensors", swap)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=names))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    with torch.no_grad():
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter).eval())(TOKENS).logits


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max())


@pytest.mark.parametrize("on_hub", [True, False])
def test_logits_are_those_of_peft(on_hub: bool, tmp_path: Path) -> None:
    set_up(tmp_path, on_hub)
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    wanted = logits(tmp_path / "base", tmp_path / "adapter")
    assert close(logits(tmp_path / "merged"), wanted)
    assert not close(logits(tmp_path / "base"), wanted)
    assert check_against(tmp_path / "merged", result.plan).recomputed > 0
    stored = [load_file(tmp_path / part / "model.safetensors") for part in ("base", "merged")]
    assert {n: t.shape for n, t in stored[0].items()} == {n: t.shape for n, t in stored[1].items()}


def test_square_experts_are_as_they_are_in_memory(tmp_path: Path) -> None:
    """Where the shapes do not show it, transformers does not swap; so does the merge."""
    set_up(tmp_path, on_hub=True, inner=24)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert close(logits(tmp_path / "merged"), logits(tmp_path / "base", tmp_path / "adapter"))


@pytest.mark.parametrize("on_hub", [True, False])
def test_as_lora(on_hub: bool, tmp_path: Path) -> None:
    set_up(tmp_path, on_hub)
    plan = prepare_merge(tmp_path / "base", tmp_path / "adapter")
    if on_hub:
        with pytest.raises(
            ConversionError, match="so its factors are not those of a LoRA; merge it, or save the base"
        ):
            plan_lora_adapter(plan, tmp_path / "lora")
        return
    write_lora_adapter(plan_lora_adapter(plan, tmp_path / "lora"))
    assert close(logits(tmp_path / "base", tmp_path / "lora"), logits(tmp_path / "base", tmp_path / "adapter"))


def test_another_size_is_refused(tmp_path: Path) -> None:
    set_up(tmp_path, on_hub=True)
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(EXPERTS[0]))
    save_file({**weights, name: weights[name][:, :, :-2].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="or its last two axes swapped"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
