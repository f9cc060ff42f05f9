"""Adapters of other kinds are refused by name, with the reason and what serves them."""

import json
from pathlib import Path

import pytest
from peft.utils import PeftType
from support.tiny_models import edit_json, save_adapter, tiny_llama

from converters import load_adapter
from converters.adapters.layouts.peft_parts.whole import LN_TUNING
from converters.adapters.refusals import NOT_MERGEABLE, NOT_MERGEABLE_FIELDS
from converters.errors import LayoutError
from converters.methods.table import PEFT_METHODS


def adapter_of(folder: Path, **changes: object) -> Path:
    save_adapter(tiny_llama(), folder)
    edit_json(folder / "adapter_config.json", **changes)
    return folder


def test_every_type_of_peft_is_read_or_refused_with_a_reason() -> None:
    assert {one.value for one in PeftType} == {"PEANUT", "LORA", LN_TUNING, *PEFT_METHODS, *NOT_MERGEABLE}
    assert not PEFT_METHODS.keys() & NOT_MERGEABLE.keys()


@pytest.mark.parametrize("peft_type", sorted(NOT_MERGEABLE))
def test_what_cannot_be_merged(tmp_path: Path, peft_type: str) -> None:
    with pytest.raises(LayoutError, match=rf"says peft_type {peft_type}: it .* cannot be merged; serve it with PEFT"):
        load_adapter(adapter_of(tmp_path, peft_type=peft_type))


def test_what_is_not_read(tmp_path: Path) -> None:
    """A type of a PEFT to come."""
    with pytest.raises(LayoutError, match=r"says peft_type NEWER; supported are .*merge_and_unload"):
        load_adapter(adapter_of(tmp_path, peft_type="NEWER"))


@pytest.mark.parametrize("field", sorted(NOT_MERGEABLE_FIELDS))
def test_variants_of_lora_that_cannot_be_merged(tmp_path: Path, field: str) -> None:
    """IBM's own package had another peft_type."""
    with pytest.raises(LayoutError, match=rf"has {field}: it .* cannot be merged; serve it with PEFT's PeftModel"):
        load_adapter(adapter_of(tmp_path, peft_type="ALORA" if "string" in field else "LORA", **{field: [1]}))


def test_an_alora_of_no_tokens_is_one(tmp_path: Path) -> None:
    """In PEFT, any list makes it one."""
    with pytest.raises(LayoutError, match="has alora_invocation_tokens: it is an aLoRA"):
        load_adapter(adapter_of(tmp_path, peft_type="LORA", alora_invocation_tokens=[]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"bn_adapter": True, "reduction_factor": 16},
            "bottleneck layers .* cannot be merged; serve it with that library",
        ),
        ({"architecture": "prefix_tuning"}, "it learns prompts.* cannot be merged; serve it with that library"),
        ({"architecture": "lora", "r": 8}, r"LoRA or .* own form; merge it there \(merge_adapter\)"),
    ],
)
def test_adapters_of_adapterhub(tmp_path: Path, config: dict[str, object], message: str) -> None:
    adapter_of(tmp_path)
    own = {"model_class": "BertModel", "config": config, "version": "1.0"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(own))
    with pytest.raises(LayoutError, match=f"AdapterHub's `adapters`: {message}"):
        load_adapter(tmp_path)
