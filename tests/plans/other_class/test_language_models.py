"""Adapters of a language model by itself on the multimodal model that contains it, and the other way round."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.tiny_models import edit_weights, save_adapter, tiny_llama
from support.zoo import IDS, LM, VISION, llava, output_of

from converters import merge, prepare_merge
from converters.errors import BaseMismatchError, TargetError, ThetaError

TEXT = {**LM, "num_key_value_heads": 2}
LISTED = ["q_proj", "v_proj"]
PATTERN = r".*language_model.*\.(q_proj|v_proj)"
OLD = {
    "model.model.language_model.": "model.language_model.model.",
    "model.lm_head": "model.language_model.lm_head",
}


def gemma3() -> tf.PreTrainedModel:
    text = {**TEXT, "tie_word_embeddings": True, "head_dim": 8, "pad_token_id": 0}
    tokens = {"image_token_index": 94, "boi_token_index": 92, "eoi_token_index": 93}
    vision = {**VISION, "image_size": 28, "patch_size": 14, "num_hidden_layers": 1}
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    return tf.Gemma3ForConditionalGeneration(config)


def qwen() -> tf.PreTrainedModel:
    """Its vision tower has modules of the same names as the language model's: `mlp.gate_proj`."""
    text = {**TEXT, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 72, "out_hidden_size": 32}
    tokens = {"image_token_id": 92, "video_token_id": 93, "vision_start_token_id": 94, "vision_end_token_id": 95}
    vision |= {"patch_size": 4, "fullatt_block_indexes": [0]}
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    return tf.Qwen2_5_VLForConditionalGeneration(config)


FAMILIES = {
    "llava": (llava, tf.LlamaForCausalLM, LISTED, PATTERN),
    "gemma3": (gemma3, tf.Gemma3ForCausalLM, LISTED, PATTERN),
    "qwen2_5_vl": (qwen, tf.Qwen2ForCausalLM, [*LISTED, "gate_proj"], PATTERN.replace("v_proj", "v_proj|gate_proj")),
}


def both(family: str, folder: Path) -> dict[str, type[tf.PreTrainedModel]]:
    """Save a multimodal model as `whole` and its language model as `text`; returns their classes."""
    torch.manual_seed(0)
    make, text_class, *_ = FAMILIES[family]
    whole = make()
    whole.save_pretrained(folder / "whole")
    settings = {**whole.config.text_config.to_dict(), "tie_word_embeddings": whole.config.tie_word_embeddings}
    if family == "qwen2_5_vl":
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    text = text_class(text_class.config_class(**{k: v for k, v in settings.items() if k != "model_type"}))
    inside = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in whole.state_dict().items()
        if "language_model" in name or name.startswith("lm_head")
    }
    text.load_state_dict(inside)
    text.save_pretrained(folder / "text")
    return {"whole": type(whole), "text": text_class}


def check(folder: Path, trained: str, given: str, classes: dict[str, Any], style: str, **settings: object) -> None:
    """Train on one, merge into the other, and compare what they compute for a text."""
    adapter = folder / "adapter"
    save_adapter(classes[trained].from_pretrained(folder / trained), adapter, task_type="CAUSAL_LM", **settings)
    fresh = classes[trained].from_pretrained(folder / trained)
    expected = output_of(PeftModel.from_pretrained(fresh, adapter).eval(), {"input_ids": IDS})
    if style == "old":
        edit_weights(adapter / "adapter_model.safetensors", with_old_names)
    result = merge(folder / given, adapter, folder / "merged")
    assert [note for note in result.plan.notes if note.startswith("by its names, adapter was trained on a")]
    found = output_of(classes[given].from_pretrained(folder / "merged").eval(), {"input_ids": IDS})
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    before = output_of(classes[given].from_pretrained(folder / given).eval(), {"input_ids": IDS})
    assert (before - expected).abs().max() > 1e-4 * expected.abs().max()


def with_old_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers before 4.52 called them."""
    renamed = {}
    for name, tensor in weights.items():
        for new, old in OLD.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    return renamed


def test_a_text_adapter_on_the_multimodal_base(tmp_path: Path) -> None:
    check(tmp_path, "text", "whole", both("llava", tmp_path), "new", target_modules=LISTED)


def test_a_multimodal_adapter_on_the_text_base(tmp_path: Path) -> None:
    check(tmp_path, "whole", "text", both("llava", tmp_path), "old", target_modules=PATTERN)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [None, ["lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_both_ways(family: str, saved: list[str] | None, tmp_path: Path) -> None:
    *_, listed, pattern = FAMILIES[family]
    for number, (trained, given, style) in enumerate(
        [("text", "whole", "new"), ("whole", "text", "new"), ("whole", "text", "old")]
    ):
        folder = tmp_path / str(number)
        targets = listed if trained == "text" else pattern
        classes = both(family, folder)
        check(folder, trained, given, classes, style, target_modules=targets, modules_to_save=saved)


def test_an_incomplete_adapter_is_refused(tmp_path: Path) -> None:
    classes = both("llava", tmp_path)
    for trained, given, targets in (("text", "whole", LISTED), ("whole", "text", PATTERN)):
        adapter = tmp_path / f"adapter-{trained}"
        save_adapter(classes[trained].from_pretrained(tmp_path / trained), adapter, target_modules=targets)
        edit_weights(
            adapter / "adapter_model.safetensors",
            lambda w: {name: tensor for name, tensor in w.items() if "layers.1.self_attn.v_proj" not in name},
        )
        with pytest.raises(ThetaError, match=r"layers\.1\.self_attn\.v_proj should have θ like the rest"):
            prepare_merge(tmp_path / given, adapter)


def test_another_language_model_is_refused(tmp_path: Path) -> None:
    llava().save_pretrained(tmp_path / "whole")
    save_adapter(tiny_llama(hidden_size=64, num_attention_heads=8), tmp_path / "wide")
    with pytest.raises(BaseMismatchError, match=r"has shape \(32, 32\), θ was trained for"):
        prepare_merge(tmp_path / "whole", tmp_path / "wide")
    save_adapter(tiny_llama(num_hidden_layers=3), tmp_path / "deep")
    with pytest.raises(TargetError, match=r"no matching tensor in the base"):
        prepare_merge(tmp_path / "whole", tmp_path / "deep")


@pytest.mark.slow
def test_what_is_not_in_a_language_model_is_refused(tmp_path: Path) -> None:
    classes = both("llava", tmp_path)
    save_adapter(classes["whole"].from_pretrained(tmp_path / "whole"), tmp_path / "adapter", target_modules=LISTED)
    with pytest.raises(TargetError, match=r"is a language model without .*vision_tower.*; give the base with all"):
        prepare_merge(tmp_path / "text", tmp_path / "adapter")


@pytest.mark.slow
def test_two_counterparts_are_refused(tmp_path: Path) -> None:
    classes = both("llava", tmp_path)
    save_adapter(classes["text"].from_pretrained(tmp_path / "text"), tmp_path / "adapter")
    file = tmp_path / "whole" / "model.safetensors"
    weights = load_file(file)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, f"model.text_model.{name[21:]}": weights[name].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"could be .*language_model.* or .*text_model.* of the base; rename"):
        prepare_merge(tmp_path / "whole", tmp_path / "adapter")


@pytest.mark.slow
def test_a_classifier_both_ways(tmp_path: Path) -> None:
    """Its head has the same name in both classes, and no counterpart in the base."""
    both("gemma3", tmp_path)
    text, whole = tf.Gemma3TextForSequenceClassification, tf.Gemma3ForSequenceClassification
    for trained, given, of_trained, of_given in (("text", "whole", text, whole), ("whole", "text", whole, text)):
        adapter, merged = tmp_path / f"on-{trained}", tmp_path / f"merged-{given}"
        targets = LISTED if trained == "text" else PATTERN
        model = of_trained.from_pretrained(tmp_path / trained, num_labels=3)
        save_adapter(model, adapter, task_type="SEQ_CLS", target_modules=targets)
        fresh = of_trained.from_pretrained(tmp_path / trained, num_labels=3)
        expected = output_of(PeftModel.from_pretrained(fresh, adapter).eval(), {"input_ids": IDS})
        result = merge(tmp_path / given, adapter, merged, labels=["a", "b", "c"])
        assert result.plan.config["architectures"] == [of_given.__name__]
        found = output_of(of_given.from_pretrained(merged).eval(), {"input_ids": IDS})
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_a_classifier_on_a_model_without_that_class(tmp_path: Path) -> None:
    both("llava", tmp_path)
    model = tf.LlamaForSequenceClassification.from_pretrained(tmp_path / "text", pad_token_id=0)
    save_adapter(model, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=LISTED)
    with pytest.raises(
        TargetError, match="no AutoModelForSequenceClassification for .* llava; .* language model, give that"
    ):
        prepare_merge(tmp_path / "whole", tmp_path / "adapter")
