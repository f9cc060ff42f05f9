"""Adapters that were trained on one tower of a model with two, merged into the model with both."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file
from support.tiny_models import edit_weights, save_adapter
from support.zoo import IDS, SIZES, VISION, image

from converters import merge, prepare_merge
from converters.errors import PeanutError, ThetaError

CASES = [
    ("CLIPVisionModel", None),
    pytest.param("CLIPTextModelWithProjection", ["text_projection"], marks=pytest.mark.slow),
    pytest.param("SiglipVisionModel", None, marks=pytest.mark.slow),
    pytest.param("SiglipTextModel", None, marks=pytest.mark.slow),
]


def two_towers(family: str) -> tf.PreTrainedModel:
    """Both towers have the same names inside, and the same shapes."""
    sizes = {**SIZES, "intermediate_size": 64}
    extra = {"projection_dim": 32} if family == "CLIP" else {}
    text = getattr(tf, f"{family}TextConfig")(
        **sizes, vocab_size=96, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, **extra
    )
    vision = getattr(tf, f"{family}VisionConfig")(**VISION, **extra)
    config = getattr(tf, f"{family}Config")(text_config=text.to_dict(), vision_config=vision.to_dict(), **extra)
    torch.manual_seed(0)
    return getattr(tf, f"{family}Model")(config)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    two_towers("CLIP").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def outputs(model: tf.PreTrainedModel, name: str) -> torch.Tensor:
    with torch.no_grad():
        found = model(**({"input_ids": IDS} if "Text" in name else image()))
    return found[0]


@pytest.mark.parametrize(("name", "saved"), CASES)
def test_a_tower_is_merged_into_both(name: str, saved: list[str] | None, tmp_path: Path) -> None:
    base = tmp_path / "base"
    two_towers("CLIP" if name.startswith("CLIP") else "Siglip").save_pretrained(base)
    model_class = getattr(tf, name)
    save_adapter(model_class.from_pretrained(base), tmp_path / "adapter", modules_to_save=saved)
    expected = outputs(
        PeftModel.from_pretrained(model_class.from_pretrained(base), tmp_path / "adapter").eval(), name
    )
    result = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert any(f"was trained on {name}, which is a part of this base" in note for note in result.plan.notes)
    found = outputs(model_class.from_pretrained(tmp_path / "merged").eval(), name)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    other = "vision_model" if "Text" in name else "text_model"
    assert not [n for n in changed if n.startswith(other)]


def test_an_incomplete_tower_is_refused(clip: Path, tmp_path: Path) -> None:
    save_adapter(tf.CLIPVisionModel.from_pretrained(clip), tmp_path / "adapter")
    edit_weights(
        tmp_path / "adapter" / "adapter_model.safetensors",
        lambda w: {n: t for n, t in w.items() if "layers.1.self_attn.v_proj" not in n},
    )
    with pytest.raises(ThetaError, match=r"layers.1.self_attn.v_proj should have θ like the rest"):
        prepare_merge(clip, tmp_path / "adapter")


def test_a_tower_that_is_not_named_is_refused(clip: Path, tmp_path: Path) -> None:
    """Names and shapes are those of either tower."""
    save_adapter(tf.CLIPVisionModel.from_pretrained(clip), tmp_path / "adapter", task_type="FEATURE_EXTRACTION")
    with pytest.raises(PeanutError, match="no matching tensor in the base"):
        prepare_merge(clip, tmp_path / "adapter")
