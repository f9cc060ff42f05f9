"""Bases whose config names an attention kernel that is not installed, and what is left of such a config."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel
from support.tiny_models import Pair, edit_json, save_adapter, tiny_llama
from support.zoo import IDS, llava, output_of

from converters import merge
from converters.models.architecture import build_architecture

KERNELS = ("flash_attention_2", "kernels-community/flash-attn")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_names_do_not_depend_on_kernels(key: str, kernel: str) -> None:
    config = tiny_llama().config.to_dict()
    names = build_architecture(config, "LlamaForCausalLM").shapes
    assert build_architecture({**config, key: kernel}, "LlamaForCausalLM").shapes == names
    named = {"experts_implementation": "no_such_kernel", "torch_dtype": "bfloat16"}
    assert build_architecture({**config, **named}, "LlamaForCausalLM").shapes == names


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_names_do_not_depend_on_kernels_of_nested_configs(key: str) -> None:
    config = llava().config.to_dict()
    names = build_architecture(config, "LlavaForConditionalGeneration").shapes
    config[key] = {"text_config": "flash_attention_2"}
    for part in ("text_config", "vision_config"):
        config[part][key] = "flash_attention_2"
    assert build_architecture(config, "LlavaForConditionalGeneration").shapes == names


@pytest.mark.slow
def test_an_adapter_with_a_head_on_such_a_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_llama(pad_token_id=0).save_pretrained(tmp_path / "base")
    model_class = tf.LlamaForSequenceClassification
    save_adapter(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter", task_type="SEQ_CLS")
    fresh = model_class.from_pretrained(tmp_path / "base")
    expected = output_of(PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval(), {"input_ids": IDS})
    edit_json(tmp_path / "base" / "config.json", _attn_implementation="flash_attention_2")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["_attn_implementation"] == "flash_attention_2"  # it is the user's
    found = model_class.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    assert (output_of(found, {"input_ids": IDS}) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_config_that_stays_the_same_is_copied_byte_for_byte(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    file = pair.base / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()), indent=7).replace('"eos_token_id"', '\n\n"eos_token_id"')
    )
    merge(pair.base, pair.adapter, pair.output)
    assert (pair.output / "config.json").read_bytes() == file.read_bytes()
    merge(pair.base, pair.adapter, pair.output, dtype="bf16", overwrite=True)
    assert json.loads((pair.output / "config.json").read_text())["dtype"] == "bfloat16"
