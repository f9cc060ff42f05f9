"""HF PEFT's own PEANuT adapters (`peft_type: PEANUT`, PEFT ≥ 0.19).

Keys are `base_model.model.<module>.peanut_{A,B}.weight` and `...peanut_{encoders,decoders}.<i>.weight`, with
A (r, out), B (out, r) and inner layers (r, r): the columns orientation (`peft/tuners/peanut/layer.py`).
`modules_to_save` appear as `base_model.model.<module>.<parameter>`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.adapters.adapter import Adapter, ModuleTheta
from converters.adapters.layouts.layout import Layout, build_adapter
from converters.adapters.layouts.peft_config import (
    adapts_nothing,
    check_fields,
    check_targeting,
    integer,
    number,
    provenance,
    targeting_of,
)
from converters.adapters.layouts.peft_keys import sort_keys
from converters.adapters.source import AdapterSource
from converters.adapters.store import ThetaStore
from converters.errors import AdapterConfigError, LayoutError, OptionError, ThetaError
from converters.files.names import ADAPTER_CONFIG
from converters.methods.peanut.activations import ACTIVATIONS, WITH_UNSAVED_PARAMETERS
from converters.methods.peanut.theta import Orientation
from converters.methods.peanut.tweaker import Tweaker

_PARAMETERS = {f"peanut_{part}": part for part in ("A", "B", "encoders", "decoders")}
_MATH_FIELDS = ("r", "depth", "act_fn", "scaling")


def claims(source: AdapterSource) -> str | None:
    """A config that says PEANUT. Raises `LayoutError` for θ of PEFT without a config."""
    if source.peft_type == "PEANUT" and not adapts_nothing(source.config):
        return f"{ADAPTER_CONFIG} says peft_type PEANUT"
    if source.config is None and any(".peanut_A." in name for name in source.keys):
        raise LayoutError(
            f"{source.weights} contains θ of HF PEFT, but there is no {ADAPTER_CONFIG} next to it, and only "
            "that states r, depth, act_fn and scaling; copy it from where the adapter was trained"
        )
    return None


def read(source: AdapterSource, evidence: str, scaling: float | None) -> Adapter:
    """The adapter in `source`.

    Raises:
        AdapterConfigError: invalid or unknown settings, or ones that disagree with the weights.
        ThetaError: weights are missing, extra, misshapen, damaged or not finite.
    """
    config, where = source.config or {}, source.config_path or source.path
    notes = _check_config(where, config)
    if scaling is not None:
        raise OptionError(f"scaling={scaling:g}: {where} states the scaling ({config['scaling']}); leave it out")
    keys = sort_keys(source, _PARAMETERS, "peanut_")
    targeting = targeting_of(where, config)
    modules = {name: _module(name, parts, source.store, config) for name, parts in sorted(keys.parts.items())}
    if targeting is not None:
        check_targeting(source.path, targeting, modules, keys.saved)
    return build_adapter(
        source,
        LAYOUT.name,
        evidence,
        modules,
        keys.saved,
        embedded=keys.embedded,
        targeting=targeting,
        notes=notes,
        **provenance(config),
    )


LAYOUT = Layout("hf-peft", claims, read)


def _check_config(where: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The notes of `check_fields`."""
    notes = check_fields(where, config, _MATH_FIELDS)
    for key, low in (("r", 1), ("depth", 0)):
        integer(where, key, config[key], low)
    number(where, "scaling", config["scaling"])
    act_fn = config["act_fn"]
    if not isinstance(act_fn, str):
        raise AdapterConfigError(f"{where}: act_fn = {act_fn!r}; expected the name of an activation")
    if act_fn in WITH_UNSAVED_PARAMETERS:
        raise AdapterConfigError(
            f"{where}: act_fn '{act_fn}' has trained parameters of its own, and PEFT did not save them; "
            "this adapter cannot be restored"
        )
    if act_fn not in ACTIVATIONS:
        raise AdapterConfigError(f"{where}: act_fn {act_fn!r} is unknown; known are {', '.join(sorted(ACTIVATIONS))}")
    return notes


def _module(name: str, keys: dict[str, str], store: ThetaStore, config: Mapping[str, Any]) -> ModuleTheta:
    """θ of one module, checked against the config's r and depth."""
    r, depth = config["r"], config["depth"]
    wanted = ["A", "B", *(f"{side}.{i}" for side in ("encoders", "decoders") for i in range(depth))]
    if missing := [part for part in wanted if part not in keys]:
        raise ThetaError(f"{name}: peanut_{missing[0]} is missing (depth {depth}); the adapter is incomplete")
    if extra := sorted(set(keys) - set(wanted)):
        raise ThetaError(f"{name}: peanut_{extra[0]} is more than depth {depth} of the config has; they disagree")
    shape = store.shapes[keys["A"]]
    size = shape[1] if len(shape) == 2 else 0
    shapes = {"A": (r, size), "B": (size, r)}
    for part in wanted:
        found, expected = store.shapes[keys[part]], shapes.get(part, (r, r))
        if found != expected:
            raise ThetaError(f"{name}: peanut_{part} has shape {found}, expected {expected} (r = {r} in the config)")
    settings = {
        "orientation": Orientation.COLUMNS.value,
        "act_fn": config["act_fn"],
        "scaling": float(config["scaling"]),
    }
    return ModuleTheta(Tweaker, {part: keys[part] for part in wanted}, settings)
