"""Configs of other versions and other hands: which code wrote them, fields that are not known, encodings."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from support.tiny_models import edit_config, save_adapter, tiny_llama

from converters import load_adapter, merge, prepare_merge
from converters.adapters.layouts.peft_parts.lora_fields import SINCE, proves_peft
from converters.errors import AdapterConfigError, LayoutError

OF_FORK = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["query", "value"],
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "task_type": None,
    "base_model_name_or_path": "",
}


def square_bert() -> tf.BertForSequenceClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return tf.BertForSequenceClassification(tf.BertConfig(**sizes, vocab_size=40, max_position_embeddings=16))


def save_lora(model: tf.PreTrainedModel, folder: Path, **settings: object) -> Path:
    torch.manual_seed(1)
    model.save_pretrained(folder / "base")
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_a_square_lora_of_peft_is_read_without_a_question(tmp_path: Path) -> None:
    adapter = save_lora(square_bert(), tmp_path, target_modules=["query", "value"])
    opened = load_adapter(adapter)
    assert (opened.layout, opened.rival) == ("lora", None)
    assert f"peft_version is {peft.__version__}" in opened.evidence
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    ids = torch.arange(8)[None]
    model = tf.BertForSequenceClassification
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model.from_pretrained(tmp_path / "base"), adapter).eval()(ids).logits
        found = model.from_pretrained(tmp_path / "merged").eval()(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_who_asks_for_the_other_layout_gets_it(tmp_path: Path) -> None:
    adapter = save_lora(square_bert(), tmp_path, target_modules=["query"])
    assert load_adapter(adapter, layout="authors-llm").layout == "authors-llm"


@pytest.mark.parametrize("field", ["init_lora_weights", "revision", "rank_pattern", "use_dora", "layer_replication"])
def test_one_field_that_the_fork_lacks_is_enough(tmp_path: Path, field: str) -> None:
    adapter = save_lora(square_bert(), tmp_path, target_modules=["query"])
    written = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(OF_FORK | {field: written[field]}))
    opened = load_adapter(adapter)
    assert (opened.layout, opened.rival) == ("lora", None)
    assert f"'{field}' is a field of HF PEFT since {SINCE[field]}" in opened.evidence


@pytest.mark.parametrize("more", [{}, {"merge_weights": False, "enable_lora": None, "use_dora": False}])
def test_where_nothing_tells_the_user_is_asked(tmp_path: Path, more: dict) -> None:
    adapter = save_lora(square_bert(), tmp_path, target_modules=["query", "value"])
    (adapter / "adapter_config.json").write_text(json.dumps(OF_FORK | more))
    with pytest.raises(
        LayoutError, match="every adapted weight is square.*no field of a config that only HF PEFT writes"
    ):
        prepare_merge(tmp_path / "base", adapter)


def test_the_table_knows_every_field_of_the_installed_peft() -> None:
    """A release that brings a field fails here; the field is added with that release."""
    written = LoraConfig().to_dict()
    assert set(written) <= set(SINCE) | set(OF_FORK)
    assert proves_peft(written) is not None


UNKNOWN = {"null": None, "false": False, "zero": 0, "text": "", "list": [], "object": {}}


@pytest.mark.parametrize("kind", ["lora", "peanut"])
@pytest.mark.parametrize("value", UNKNOWN)
def test_an_unknown_field_that_is_off_gets_a_note(tmp_path: Path, kind: str, value: str) -> None:
    if kind == "lora":
        save_lora(tiny_llama(), tmp_path, target_modules=["q_proj"])
    else:
        tiny_llama().save_pretrained(tmp_path / "base")
        save_adapter(tiny_llama(), tmp_path / "adapter")
    quiet = load_adapter(tmp_path / "adapter")
    assert quiet.notes == ()
    edit_config(tmp_path / "adapter", use_next_year=UNKNOWN[value])
    plan = prepare_merge(tmp_path / "base", tmp_path / "adapter")
    assert plan.adapters[0].adapter.digest == quiet.digest
    assert any(f"does not know 'use_next_year' = {UNKNOWN[value]!r}; by its value it is off" in n for n in plan.notes)


@pytest.mark.parametrize("value", [True, 1, "on", [0], {"a": None}])
def test_an_unknown_field_that_is_on_is_refused_by_name(tmp_path: Path, value: object) -> None:
    adapter = save_lora(tiny_llama(), tmp_path, target_modules=["q_proj"])
    edit_config(adapter, use_next_year=value)
    with pytest.raises(AdapterConfigError, match="'use_next_year' = .* is not a setting known to this version"):
        load_adapter(adapter)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_configs_in_other_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    adapter = save_lora(tiny_llama(), tmp_path, target_modules=["q_proj"])
    digest = load_adapter(adapter).digest
    for path in (adapter / "adapter_config.json", tmp_path / "base" / "config.json"):
        path.write_bytes(path.read_text("utf-8").encode(encoding))
    assert load_adapter(adapter).digest == digest
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))["model_type"] == "llama"
