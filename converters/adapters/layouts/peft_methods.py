"""HF PEFT's adapters of every method that says how PEFT saves it (`Method.peft`).

PEANuT and LoRA have files of their own. Keys are `base_model.model.<module>.<parameter>`. Which types there are, and
what their configs mean, is said by the methods (`converters/methods/table.py`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from converters.adapters.adapter import Adapter, ModuleTheta
from converters.adapters.layouts.layout import Layout, build_adapter
from converters.adapters.layouts.peft_config import (
    adapts_nothing,
    boolean,
    check_fields,
    check_targeting,
    located,
    provenance,
    targeting_of,
    trained_biases,
)
from converters.adapters.layouts.peft_keys import PeftKeys, sort_keys
from converters.adapters.source import AdapterSource
from converters.adapters.targeting import Targeting
from converters.errors import LayoutError, OptionError, ThetaError
from converters.files.names import ADAPTER_CONFIG
from converters.methods.base import Method
from converters.methods.peft_form import PeftForm
from converters.methods.table import PEFT_METHODS, find_peft_method

_LORA = ("lora_A", "lora_B")  # what plain LoRA has as well
_INCOMPLETE = "the adapter is incomplete"


def claims(source: AdapterSource) -> str | None:
    """A config with one of the types. Raises `LayoutError` for θ of one of them without a config."""
    if source.peft_type in PEFT_METHODS and not adapts_nothing(source.config):
        return f"{ADAPTER_CONFIG} says peft_type {source.peft_type}"
    marks = [f".{name}." for _, form in PEFT_METHODS.values() for name in form.parameters if name not in _LORA]
    if source.config is None and any(mark in f"{key}." for key in source.keys for mark in marks):
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
    method, form = find_peft_method(config)
    notes = check_fields(where, config, form.fields, ("fan_in_fan_out", "bias", *form.inert))
    if scaling is not None:
        raise OptionError(f"scaling={scaling:g}: {where} states all that {form.peft_type} needs; leave it out")
    transposed = boolean(where, "fan_in_fan_out", config.get("fan_in_fan_out") or False)
    bias = trained_biases(where, config)
    if form.missing and not any(f".{name}" in key for name in form.parameters for key in source.keys):
        raise ThetaError(f"{source.weights}: {form.missing}")
    keys = sort_keys(source, form.parameters, form.mark, bias, form.shared, form.grouped)
    grouped = _grouped(source, form, keys)
    modules = {
        module: _theta_of(source, method, form, module, parts | keys.shared | grouped[module], transposed)
        for module, parts in sorted(keys.parts.items())
    }
    targeting = targeting_of(where, config)
    if targeting is not None and form.repeats_ties:
        modules = _without_copies(source, modules, targeting)
    if targeting is not None:
        check_targeting(source.path, targeting, modules, keys.saved, bias)
    return build_adapter(
        source, "hf-peft", evidence, modules, keys.saved, embedded=keys.embedded, targeting=targeting,
        notes=notes, **provenance(config),
    )  # fmt: skip


LAYOUT = Layout("hf-peft", claims, read)


def _grouped(source: AdapterSource, form: PeftForm, keys: PeftKeys) -> dict[str, dict[str, str]]:
    """Module -> part of θ that it shares with its group -> key. Raises as `read` does."""
    if not form.grouped:
        return {module: {} for module in keys.parts}

    def read_part(module: str, part: str) -> Tensor:
        if part not in keys.parts[module]:
            name = next(name for name, one in form.parameters.items() if one == part)
            raise ThetaError(f"{source.path}: {module}: {name} is missing; {form.missing or _INCOMPLETE}")
        return source.store.tensor(keys.parts[module][part])

    with located(source.config_path):
        groups = form.groups(source.config or {}, sorted(keys.parts), read_part)
    for part, found in keys.grouped.items():
        if unused := sorted(set(found) - set(groups.values())):
            raise ThetaError(f"{source.path}: {found[unused[0]]} ({part}) belongs to none of the adapted modules")
    return {
        module: {part: found[group] for part, found in keys.grouped.items() if group in found}
        for module, group in groups.items()
    }


def _without_copies(
    source: AdapterSource, modules: Mapping[str, ModuleTheta], targeting: Targeting
) -> dict[str, ModuleTheta]:
    """Without θ of modules that are not targeted and have the same θ: PEFT saves it under every name of a tie."""
    wanted = {module: theta for module, theta in modules.items() if targeting.matches(module)}
    others = {module: theta for module, theta in modules.items() if module not in wanted}
    copies = {
        module
        for module, theta in others.items()
        for one in wanted.values()
        if all(
            torch.equal(source.store.tensor(key), source.store.tensor(one.parts[part]))
            for part, key in theta.parts.items()
        )
    }
    return {module: theta for module, theta in modules.items() if module not in copies}


def _theta_of(
    source: AdapterSource,
    method: type[Method],
    form: PeftForm,
    module: str,
    parts: Mapping[str, str],
    transposed: bool,
) -> ModuleTheta:
    """θ of one module. Raises as `read` does."""
    for name, part in {**form.parameters, **form.shared, **form.grouped}.items():
        if part not in parts and part not in form.optional:
            raise ThetaError(f"{source.path}: {module}: {name} is missing; {form.missing or _INCOMPLETE}")
    shapes = {part: source.store.shapes[key] for part, key in parts.items()}
    try:
        with located(source.config_path):
            settings = form.settings(source.config or {}, module, shapes)
    except IndexError:  # an axis that the settings look at
        raise ThetaError(f"{module}: θ has shapes {shapes}, which are not those of {method.name}") from None
    return ModuleTheta(method, parts, settings, transposed)
