"""Tied embeddings, and vocabularies that grew in the training."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.tiny_models import Pair, save_adapter, tiny_llama, unmerged
from support.zoo import IDS, output_of

from converters import merge, prepare_merge
from converters.errors import BaseMismatchError


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_saved_half_of_a_tie_is_untied(make_pair: Callable[..., Pair], saved: list[str]) -> None:
    pair = make_pair(tiny_llama(tie_word_embeddings=True), modules_to_save=saved)
    expected = output_of(unmerged(tf.LlamaForCausalLM, pair.base, pair.adapter), {"input_ids": IDS})
    result = merge(pair.base, pair.adapter, pair.output)
    merged = tf.LlamaForCausalLM.from_pretrained(pair.output).eval()
    assert (output_of(merged, {"input_ids": IDS}) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert merged.config.tie_word_embeddings is False
    assert any("no longer tied" in note for note in result.plan.notes)
    assert (merged.lm_head.weight - merged.model.embed_tokens.weight).abs().max() > 0.01


def test_tied_weights_stay_tied(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(tiny_llama(tie_word_embeddings=True))
    merge(pair.base, pair.adapter, pair.output)
    assert "lm_head.weight" not in load_file(pair.output / "model.safetensors")
    assert json.loads((pair.output / "config.json").read_text())["tie_word_embeddings"] is True


def test_equal_halves_of_a_tie_stay_tied(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(tiny_llama(tie_word_embeddings=True), modules_to_save=["embed_tokens", "lm_head"])
    file = pair.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.lm_head.weight"] = weights["base_model.model.model.embed_tokens.weight"].clone()
    save_file(weights, file)
    merge(pair.base, pair.adapter, pair.output)
    merged = tf.LlamaForCausalLM.from_pretrained(pair.output)
    assert merged.config.tie_word_embeddings is True
    assert torch.equal(merged.lm_head.weight, weights["base_model.model.lm_head.weight"])


def test_theta_on_a_tied_head_leaves_the_embedding_alone(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(tiny_llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    expected = output_of(unmerged(tf.LlamaForCausalLM, pair.base, pair.adapter), {"input_ids": IDS})
    merge(pair.base, pair.adapter, pair.output)
    merged = tf.LlamaForCausalLM.from_pretrained(pair.output).eval()
    assert (output_of(merged, {"input_ids": IDS}) - expected).abs().max() <= 1e-5 * expected.abs().max()
    base = load_file(pair.base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(merged.model.embed_tokens.weight, base)


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_vocabulary(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    model = tiny_llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(101)
    save_adapter(model, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(101)
    expected = output_of(PeftModel.from_pretrained(model, tmp_path / "adapter").eval(), {"input_ids": IDS + 5})
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == 101
    assert (output_of(merged, {"input_ids": IDS + 5}) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_half_a_grown_vocabulary_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(101)
    save_adapter(model, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    with pytest.raises(BaseMismatchError, match=r"lm_head.weight has shape \(96, 32\).*needs \(101, 32\)"):
        prepare_merge(tmp_path / "base", tmp_path / "adapter")
