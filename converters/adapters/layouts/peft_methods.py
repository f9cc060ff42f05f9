"""HF PEFT's adapters of every method that says how PEFT saves it (`Method.peft`).

PEANuT and LoRA have files of their own. Keys are `base_model.model.<module>.<parameter>`. Which types there are, and
what their configs mean, is said by the methods (`converters/methods/table.py`).
"""

from typing import Any

from converters.adapters.adapter import Adapter, ModuleTheta
from converters.adapters.layouts.layout import Layout, build_adapter
from converters.adapters.layouts.peft_config import boolean, check_fields, check_targeting, provenance, targeting_of
from converters.adapters.layouts.peft_keys import sort_keys
from converters.adapters.source import AdapterSource
from converters.errors import LayoutError, OptionError, ThetaError
from converters.files.names import ADAPTER_CONFIG
from converters.methods.table import PEFT_METHODS

_OFF: tuple[Any, ...] = (None, False, [], {})  # values of fields that are not in use


def claims(source: AdapterSource) -> str | None:
    """A config with one of the types. Raises `LayoutError` for θ of one of them without a config."""
    if source.peft_type in PEFT_METHODS:
        return f"{ADAPTER_CONFIG} says peft_type {source.peft_type}"
    marks = [f".{name}" for _, form in PEFT_METHODS.values() for name in form.parameters]
    if source.config is None and any(f"{mark}." in f"{key}." for key in source.keys for mark in marks):
        raise LayoutError(
            f"{source.weights} contains θ of HF PEFT, but there is no {ADAPTER_CONFIG} next to it, which states the "
            "method; copy it from where the adapter was trained"
        )
    return None


def read(source: AdapterSource, evidence: str, scaling: float | None) -> Adapter:
    """The adapter in `source`.

    Raises:
        AdapterConfigError: invalid or unknown settings, or ones that disagree with the weights.
        ThetaError: weights are missing, extra, misshapen, damaged or not finite.
        OptionError: `scaling` was given, and the method has none, or its config states it.
    """
    config, where = source.config or {}, source.config_path or source.path
    method, form = PEFT_METHODS[str(source.peft_type)]
    check_fields(where, config, form.fields, ("fan_in_fan_out", *form.inert), off=_OFF)
    if scaling is not None:
        raise OptionError(f"scaling={scaling:g}: {where} states all that {form.peft_type} needs; leave it out")
    transposed = boolean(where, "fan_in_fan_out", config.get("fan_in_fan_out") or False)
    keys = sort_keys(source, form.parameters, form.mark)
    modules = {}
    for module, parts in sorted(keys.parts.items()):
        if missing := [name for name, part in form.parameters.items() if part not in parts]:
            raise ThetaError(f"{module}: {missing[0]} is missing; the adapter is incomplete")
        shapes = {part: source.store.shapes[key] for part, key in parts.items()}
        modules[module] = ModuleTheta(method, parts, form.settings(config, module, shapes), transposed)
    targeting = targeting_of(where, config)
    if targeting is not None:
        check_targeting(source.path, targeting, modules, keys.saved)
    return build_adapter(
        source, "hf-peft", evidence, modules, keys.saved, embedded=keys.embedded, targeting=targeting,
        **provenance(config),
    )  # fmt: skip


LAYOUT = Layout("hf-peft", claims, read)
