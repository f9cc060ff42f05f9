"""TinyLoRA: which vector a module shares, projections that were not saved or do not fit, and embeddings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from support.damage import changed, without
from support.method_zoo import TARGETS
from support.peft_methods import MODELS, close, logits, reloaded, train
from support.tiny_models import edit_json, edit_weights, tiny_llama

from converters import load_adapter, merge, prepare_merge
from converters.errors import ConversionError, ThetaError
from converters.outputs.lora.plan import plan_lora_adapter

LLAMA = {"target_modules": TARGETS["llama"]}


def trained(tmp_path: Path, config: PeftConfig) -> Path:
    train(MODELS["llama"](), config, tmp_path / "base", tmp_path / "adapter")
    return tmp_path / "adapter"


def tinylora(**settings: Any) -> PeftConfig:
    return peft.TinyLoraConfig(**{"r": 3, "u": 5, "weight_tying": 0.5, **LLAMA, **settings})


def test_what_is_trained_may_be_of_another_dtype_than_the_projections(tmp_path: Path) -> None:
    """A model in bfloat16 trains v in that; P is drawn in float32."""
    adapter = trained(tmp_path, tinylora())

    def halved(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: tensor.bfloat16() if "tinylora_v" in key else tensor for key, tensor in w.items()}

    edit_weights(adapter / "adapter_model.safetensors", halved)
    wanted = logits(reloaded(tiny_llama(), tmp_path / "base", adapter))
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    found = type(tiny_llama()).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert close(logits(found), wanted)
    assert load_adapter(adapter).rank("model.layers.0.self_attn.q_proj") == 3


@pytest.mark.parametrize("is_tied", [False, True])
def test_tinylora_on_an_embedding(tmp_path: Path, is_tied: bool) -> None:
    """The output head stays as it is, also where it was tied to the embedding. As LoRA, it is not served."""
    plain = tiny_llama(tie_word_embeddings=is_tied)
    train(plain, tinylora(target_modules=["embed_tokens", "v_proj"]), tmp_path / "base", tmp_path / "adapter")
    wanted = logits(reloaded(plain, tmp_path / "base", tmp_path / "adapter"))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert close(logits(type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()), wanted)
    with pytest.raises(ConversionError, match=r"model\.embed_tokens is not a linear layer.*merge it"):
        plan_lora_adapter(prepare_merge(tmp_path / "base", load_adapter(tmp_path / "adapter")), tmp_path / "lora")


def test_tinylora_of_a_base_in_half_precision(tmp_path: Path) -> None:
    """Whose projections were rounded: they are found nevertheless."""
    train(tiny_llama().bfloat16(), tinylora(), tmp_path / "base", tmp_path / "adapter")
    shared = {theta.parts["v"] for theta in load_adapter(tmp_path / "adapter").modules.values()}
    assert len(shared) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("q_proj.tinylora_P", lambda p: p * 1.1), "is none of those that projection_seed 42 gives for 6 mod"),
        (changed("tinylora_P", lambda p: p[:, :, :2]), r"tinylora_P has shape \(5, 3, 2\); expected \(u, r, r\)"),
        (changed("tinylora_P", lambda p: p[0]), r"tinylora_P has shape \(3, 3\); expected \(u, r, r\)"),
        (without("tinylora_v.1"), "tinylora_v is missing"),
        (lambda w: {**w, "base_model.tinylora_v.3": torch.ones(5)}, "belongs to none of the adapted modules"),
        (without("layers.1.self_attn.v_proj.tinylora_P"), "tinylora_P is missing.*save_projection"),
    ],
)
def test_which_vector_is_shared_cannot_be_told(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    adapter = trained(tmp_path, tinylora())
    edit_weights(adapter / "adapter_model.safetensors", change)
    with pytest.raises(ThetaError, match=message):
        load_adapter(adapter)


def test_projections_that_look_alike(tmp_path: Path) -> None:
    """Of one number each, rounded: which is which is not guessed."""
    adapter = trained(tmp_path, tinylora(r=1, u=1, target_modules="all-linear"))
    edit_json(adapter / "adapter_config.json", target_modules=["mlp.up_proj"])
    edit_weights(
        adapter / "adapter_model.safetensors",
        lambda w: {
            f"base_model.model.model.layers.{i}.mlp.up_proj.{part}": w[
                f"base_model.model.model.layers.0.mlp.up_proj.{part}"
            ].clone()
            for i in range(2000)
            for part in ("tinylora_A", "tinylora_B", "tinylora_P")
        },
    )
    with pytest.raises(ThetaError, match="is more than one of those that projection_seed"):
        load_adapter(adapter)
