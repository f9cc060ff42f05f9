"""Adapters of layers that transformers splits from a larger tensor of the checkpoint, against PEFT.

DINOv2 with SwiGLU stores gate_proj and up_proj as one tensor, `mlp.weights_in`.
"""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import HiraConfig, HRAConfig, IA3Config, LoraConfig, PeanutConfig, PeftConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from support.tiny_models import edit_weights, unmerged
from transformers import Dinov2Config, Dinov2ForImageClassification

from converters import Weighted, export_onnx, load_adapter, merge, prepare_merge
from converters.errors import ConversionError, TargetError, ThetaError
from converters.files.header import read_header
from converters.outputs.checkpoint.recheck import check_against
from converters.outputs.lora.plan import plan_lora_adapter

GATES = ["gate_proj", "up_proj"]
METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=3, target_modules=GATES, init_lora_weights=False),
    "lora on one": LoraConfig(r=3, target_modules=["up_proj", "q_proj"], init_lora_weights=False),
    "lora and a head": LoraConfig(r=3, target_modules=GATES, init_lora_weights=False, modules_to_save=["classifier"]),
    "dora": LoraConfig(r=3, target_modules=GATES, init_lora_weights=False, use_dora=True),
    "peanut": PeanutConfig(r=4, depth=1, target_modules=GATES, init_weights=False, scaling=0.5),
    "hra": HRAConfig(r=2, target_modules=GATES, init_weights=False),
    "vera drawn again": VeraConfig(r=3, target_modules=["gate_proj"], save_projection=False, init_weights=False),
    "hira": HiraConfig(r=3, target_modules=GATES, init_weights=False),
}


def save(folder: Path, config: PeftConfig) -> None:
    torch.manual_seed(0)
    model = Dinov2ForImageClassification(
        Dinov2Config(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            mlp_ratio=2,
            use_swiglu_ffn=True,
            image_size=28,
            patch_size=7,
            num_labels=3,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(folder / "base")
    adapted = get_peft_model(Dinov2ForImageClassification.from_pretrained(folder / "base"), deepcopy(config))
    with torch.no_grad():
        for _name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder / "adapter")


def logits(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, 28, 28)).logits


@pytest.mark.parametrize("name", METHODS)
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    save(tmp_path, METHODS[name])
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    wanted = logits(unmerged(Dinov2ForImageClassification, tmp_path / "base", tmp_path / "adapter"))
    merged, plain = (logits(Dinov2ForImageClassification.from_pretrained(tmp_path / p)) for p in ("merged", "base"))
    scale = wanted.abs().max()
    assert (merged - wanted).abs().max() < 1e-4 * scale
    assert (plain - wanted).abs().max() > 1e-3 * scale
    base, written = (
        {i.name: i.shape for i in read_header(tmp_path / p / "model.safetensors")[0]} for p in ("base", "merged")
    )
    assert written == base
    plan = prepare_merge(tmp_path / "base", tmp_path / "adapter")
    assert check_against(tmp_path / "merged", plan).max_ulp < 0.51


def test_a_sum_of_methods_is_that_of_their_deltas(tmp_path: Path) -> None:
    for name in ("lora", "peanut"):
        save(tmp_path / name, METHODS[name])
    base = tmp_path / "lora" / "base"
    adapters = [Weighted(load_adapter(tmp_path / n / "adapter"), w) for n, w in (("lora", 0.5), ("peanut", -2.0))]
    merge(base, adapters, tmp_path / "sum")
    for adapter, part in zip(adapters, ("a", "b"), strict=True):
        merge(base, [adapter], tmp_path / part)
    key = "dinov2.encoder.layer.1.mlp.weights_in.weight"
    summed, first, second, plain = (
        load_file(folder / "model.safetensors")[key] for folder in (*(tmp_path / n for n in ("sum", "a", "b")), base)
    )
    assert torch.allclose(summed - plain, (first - plain) + (second - plain), atol=1e-6)


def test_an_adapter_without_the_second_half_is_refused(tmp_path: Path) -> None:
    save(tmp_path, METHODS["lora"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    edit_weights(file, lambda w: {n: t for n, t in w.items() if "layer.1.mlp.up_proj" not in n})
    with pytest.raises(ThetaError, match="should have θ like the rest"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_what_has_no_place_for_a_part_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "lora", METHODS["lora"])
    plan = prepare_merge(tmp_path / "lora" / "base", tmp_path / "lora" / "adapter")
    with pytest.raises(ConversionError, match="only a part of .*weights_in.weight"):
        plan_lora_adapter(plan, tmp_path / "out")
    with pytest.raises(ConversionError, match="only a part of .*weights_in.weight"):
        export_onnx(tmp_path / "lora" / "base", tmp_path / "lora" / "adapter", tmp_path / "onnx")
    save(tmp_path / "ia3", IA3Config(target_modules=GATES, feedforward_modules=[], init_ia3_weights=False))
    with pytest.raises(TargetError, match="its update is not supported"):
        merge(tmp_path / "ia3" / "base", tmp_path / "ia3" / "adapter", tmp_path / "merged")
