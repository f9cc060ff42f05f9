"""Bases of a model type that transformers does not know: what needs no model code is merged, the rest refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file
from support.tiny_models import Pair, edit_config, edit_json, edit_weights, save_adapter, tiny_llama, unmerged
from support.zoo import IDS, output_of

from converters import merge, prepare_merge
from converters.errors import BaseMismatchError, TargetError, UnknownModelError
from converters.outputs.lora import plan_lora_adapter, write_lora_adapter

AUTO_MAP = {
    "AutoConfig": "configuration_mine.MyConfig",
    "AutoModelForCausalLM": "modeling_mine.LlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mine.LlamaForSequenceClassification",
}


def disguise(base: Path, **changes: object) -> None:
    """Make it a model with code of its own, which would end the test if it ran."""
    edit_json(base / "config.json", **{"model_type": "mine", "auto_map": AUTO_MAP, **changes})
    for file in ("configuration_mine.py", "modeling_mine.py"):
        (base / file).write_text("raise SystemExit('remote code ran')\n")


def logits_of(folder: Path, model_class: type[tf.PreTrainedModel]) -> torch.Tensor:
    """What a merged model computes, as the Llama that it is."""
    edit_json(folder / "config.json", model_type="llama", pad_token_id=0)
    return output_of(model_class.from_pretrained(folder).eval(), {"input_ids": IDS})


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "saved",
    [["lm_head"], *(pytest.param(saved, marks=pytest.mark.slow) for saved in (None, ["embed_tokens", "lm_head"]))],
)
def test_what_has_the_names_of_the_files_needs_no_code(
    make_pair: Callable[..., Pair], saved: list[str] | None
) -> None:
    pair = make_pair(modules_to_save=saved, target_modules=["q_proj", "down_proj"])
    expected = output_of(unmerged(tf.LlamaForCausalLM, pair.base, pair.adapter), {"input_ids": IDS})
    disguise(pair.base, tie_word_embeddings=False)
    result = merge(pair.base, pair.adapter, pair.output)
    assert not saved or any(
        "cannot build LlamaForCausalLM (mine) without remote code" in note for note in result.plan.notes
    )
    assert (pair.output / "modeling_mine.py").read_bytes() == (pair.base / "modeling_mine.py").read_bytes()
    assert_close(logits_of(pair.output, tf.LlamaForCausalLM), expected)


def test_a_new_head_gets_the_class_that_the_auto_map_names(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = make_pair()
    model_class = tf.LlamaForSequenceClassification
    model = model_class.from_pretrained(pair.base, num_labels=5, pad_token_id=0)
    save_adapter(model, tmp_path / "head", task_type="SEQ_CLS")
    fresh = model_class.from_pretrained(pair.base, num_labels=5, pad_token_id=0)
    expected = output_of(PeftModel.from_pretrained(fresh, tmp_path / "head").eval(), {"input_ids": IDS})
    disguise(pair.base)
    result = merge(pair.base, tmp_path / "head", pair.output, labels=list("abcde"))
    assert any("needs tensors that neither base nor adapter has was not checked" in n for n in result.plan.notes)
    config = json.loads((pair.output / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"]["4"] == "e"
    assert_close(logits_of(pair.output, model_class), expected)
    edit_json(pair.base / "config.json", auto_map={})
    with pytest.raises(UnknownModelError, match=r"neither .* which class has score.weight: name it there"):
        prepare_merge(pair.base, tmp_path / "head")


@pytest.mark.slow
def test_a_head_that_the_base_has_may_get_other_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_llama(pad_token_id=0).config
    tf.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    wider = tf.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=4, ignore_mismatched_sizes=True
    )
    save_adapter(wider, tmp_path / "adapter", task_type="SEQ_CLS")
    disguise(tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert len(json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"]) == 4
    edit_json(tmp_path / "base" / "config.json", model_type="llama")
    fresh = tf.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=4, ignore_mismatched_sizes=True
    )
    expected = output_of(PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval(), {"input_ids": IDS})
    assert_close(logits_of(tmp_path / "merged", tf.LlamaForSequenceClassification), expected)


def test_where_code_would_be_needed_it_is_refused(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(modules_to_save=["lm_head"])
    disguise(pair.base, tie_word_embeddings=None)
    with pytest.raises(UnknownModelError, match=r"changes lm_head.weight, .* whether it is tied .* config.json"):
        prepare_merge(pair.base, pair.adapter)
    edit_json(pair.base / "config.json", tie_word_embeddings=False)
    prepare_merge(pair.base, pair.adapter)
    edit_weights(
        pair.adapter / "adapter_model.safetensors",
        lambda w: {name.replace("self_attn", "attention"): tensor for name, tensor in w.items()},
    )
    with pytest.raises(UnknownModelError, match=r"remote code are not run.*the base has no .*attention.q_proj"):
        prepare_merge(pair.base, pair.adapter)


@pytest.mark.slow
def test_a_class_of_its_own_of_a_known_model_type(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    expected = output_of(unmerged(tf.LlamaForCausalLM, pair.base, pair.adapter), {"input_ids": IDS})
    known = {"model_type": "llama", "architectures": ["MyLlamaForCausalLM"], "tie_word_embeddings": False}
    disguise(pair.base, **known)
    merge(pair.base, pair.adapter, pair.output)
    assert json.loads((pair.output / "config.json").read_text())["architectures"] == ["MyLlamaForCausalLM"]
    assert_close(logits_of(pair.output, tf.LlamaForCausalLM), expected)
    edit_json(pair.base / "config.json", architectures=["LlamaForCausalLM"], hidden_size="its own")
    prepare_merge(pair.base, pair.adapter)
    edit_json(pair.base / "config.json", auto_map=None)
    with pytest.raises(TargetError, match="cannot build LlamaForCausalLM from the base's config"):
        prepare_merge(pair.base, pair.adapter)


def test_a_resized_vocabulary_has_to_be_whole(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(modules_to_save=["embed_tokens", "lm_head"])
    disguise(pair.base, tie_word_embeddings=False)
    file = pair.adapter / "adapter_model.safetensors"
    longer = {n: torch.cat([t, t[:2]]) for n, t in load_file(file).items() if len(t) == 96}
    edit_weights(file, lambda w: w.update(longer))
    assert prepare_merge(pair.base, pair.adapter).config["vocab_size"] == 98
    edit_weights(file, lambda w: {n: t for n, t in w.items() if "lm_head" not in n})
    edit_config(pair.adapter, modules_to_save=["embed_tokens"])
    with pytest.raises(BaseMismatchError, match="part of a resized vocabulary is missing"):
        prepare_merge(pair.base, pair.adapter)


@pytest.mark.slow
def test_lora_for_such_a_base(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    expected = output_of(unmerged(tf.LlamaForCausalLM, pair.base, pair.adapter), {"input_ids": IDS})
    disguise(pair.base)
    write_lora_adapter(plan_lora_adapter(prepare_merge(pair.base, pair.adapter), pair.output), device="cpu")
    edit_json(pair.base / "config.json", model_type="llama")
    assert_close(output_of(unmerged(tf.LlamaForCausalLM, pair.base, pair.output), {"input_ids": IDS}), expected)
