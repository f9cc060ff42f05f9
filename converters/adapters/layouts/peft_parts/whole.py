"""Adapters of HF PEFT that replace tensors and have no other θ: LN tuning, a head alone, trained biases alone.

LN tuning trains copies of modules (`peft/tuners/ln_tuning/layer.py`): `<module>.ln_tuning_layers.<parameter>`. An
adapter of any other type that was made with `target_modules="dummy-target-modules"` adapts no module; what it trains
are its modules_to_save and, with `bias="all"`, the biases (BitFit, arXiv 2106.10199).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.adapters.adapter import Adapter
from converters.adapters.layouts.layout import Layout, build_adapter
from converters.adapters.layouts.lora_names import INERT_FIELDS
from converters.adapters.layouts.peft_config import (
    adapts_nothing,
    check_fields,
    check_targeting,
    provenance,
    targeting_of,
    trained_biases,
)
from converters.adapters.layouts.peft_keys import sort_keys
from converters.adapters.layouts.peft_parts.stacked import on_stacked_layers
from converters.adapters.source import AdapterSource
from converters.errors import OptionError, ThetaError
from converters.files.names import ADAPTER_CONFIG
from converters.methods.table import PEFT_METHODS, find_peft_method

LN_TUNING = "LN_TUNING"
_REPLACED = "ln_tuning_layers"
_LORA_FIELDS = (*INERT_FIELDS, "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_PEANUT_FIELDS = ("r", "depth", "act_fn", "scaling")


def claims(source: AdapterSource) -> str | None:
    """LN_TUNING in the config, or a config of any type without target modules."""
    if source.peft_type == LN_TUNING:
        return f"{ADAPTER_CONFIG} says peft_type {LN_TUNING}"
    if source.config is not None and adapts_nothing(source.config):
        targets = source.config["target_modules"]
        return f"{ADAPTER_CONFIG} says peft_type {source.peft_type} with target_modules {targets!r}"
    return None


def read(source: AdapterSource, evidence: str, scaling: float | None) -> Adapter:
    """The adapter in `source`.

    Raises:
        AdapterConfigError: invalid or unknown settings, or ones that disagree with the weights.
        ThetaError: weights are missing, extra, misshapen, damaged or not finite.
        OptionError: `scaling` was given.
    """
    config, where = source.config or {}, source.config_path or source.path
    replaces = not adapts_nothing(config)
    notes = check_fields(where, config, (), _fields_without_effect(config))
    if scaling is not None:
        raise OptionError(f"scaling={scaling:g}: the adapter replaces tensors, and nothing is scaled; leave it out")
    bias = trained_biases(where, config)
    keys = sort_keys(source, {}, "ln_tuning_", bias, whole=_REPLACED if replaces else "modules_to_save")
    if replaces and not keys.replaced:
        raise ThetaError(f"{source.weights}: no key with {_REPLACED}; the adapter is incomplete")
    targeting = targeting_of(where, config)
    if targeting is not None:
        own = keys.replaced if replaces else set()
        others = [name for name in keys.saved if name.rpartition(".")[0] not in own]
        check_targeting(source.path, targeting, own, others, bias)
        targeting = replace(targeting, replaces=True) if replaces else None
    facts = provenance(config) | {"targeting": targeting, "notes": notes}
    opened = build_adapter(source, "hf-peft", evidence, {}, keys.saved, embedded=keys.embedded, **facts)
    return on_stacked_layers(opened, where, config) if source.peft_type == "LORA" else opened


LAYOUT = Layout("hf-peft", claims, read)


def _fields_without_effect(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields that have no effect where no module is adapted, beside those of every config."""
    peft_type = config.get("peft_type")
    if peft_type in PEFT_METHODS:
        _, form = find_peft_method(config)
        return ("fan_in_fan_out", "bias", *form.fields, *form.inert)
    return {"LORA": _LORA_FIELDS, "PEANUT": _PEANUT_FIELDS}.get(str(peft_type), ())
