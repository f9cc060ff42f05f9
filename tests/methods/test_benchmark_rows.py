"""The benchmark of methods has an adapter of every method that a Llama can have."""

import importlib
import json
from collections.abc import Mapping
from typing import Any

import pytest
from support.paths import ROOT

from converters.methods.table import LORA_INITS, LORA_VARIANTS, METHODS, find_peft_method


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("method_adapters")


def method_of(config: Mapping[str, Any]) -> str:
    """What a config is read as, as far as it says that without the names of modules."""
    if config["peft_type"] == "PEANUT":
        return "peanut"
    if config["peft_type"] != "LORA":
        return find_peft_method(config)[0].name
    if config["init_lora_weights"] in LORA_INITS:
        return LORA_INITS[config["init_lora_weights"]].name
    name = next((method.name for flag, (method, _) in LORA_VARIANTS.items() if config.get(flag)), "lora")
    return f"{name}-embedding" if "embed_tokens" in config["target_modules"] else name


def test_every_method_has_a_row_or_a_reason(benchmark: Any) -> None:
    assert set(benchmark.ROWS) - {"lora"} | set(benchmark.WITHOUT_ROW) == set(METHODS)
    assert not set(benchmark.ROWS) & set(benchmark.WITHOUT_ROW)


def test_the_rows_are_what_they_are_called(benchmark: Any) -> None:
    saved = {name: json.loads(json.dumps(row.to_dict(), default=list)) for name, row in benchmark.ROWS.items()}
    assert {name: method_of(config) for name, config in saved.items()} == {name: name for name in saved}
