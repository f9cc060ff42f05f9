"""How HF PEFT saves a method's θ: what `converters/adapters/layouts/` needs to know to read it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from converters.errors import AdapterConfigError, ThetaError

Shapes = Mapping[str, tuple[int, ...]]  # part of θ -> its shape


# modules, and what reads a part of one -> the group that each of them is in
Groups = Callable[[Mapping[str, Any], Sequence[str], Callable[[str, str], Tensor]], Mapping[str, str]]


def _no_groups(
    config: Mapping[str, Any], modules: Sequence[str], read: Callable[[str, str], Tensor]
) -> dict[str, str]:
    return {}


def _no_settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class PeftForm:
    """One `peft_type` of an adapter_config.json, or a variant of LoRA.

    Attributes:
        peft_type: as adapter_config.json spells it.
        parameters: name of a parameter in a state dict (`ia3_l`) -> part of θ.
        mark: stands in every key of θ; a key with it that is not one of `parameters` is refused.
        flag: of a variant of LoRA: the field of a LoraConfig that turns it on.
        when: of a variant of another type: fields of the config, and the values that turn it on.
        optional: parts that a module need not have.
        shared: name of a tensor that is saved once, for all modules -> part of θ.
        grouped: name of a tensor that is saved once for each group of modules (`frod_V.<group>`) -> part of θ.
        groups: the group of every module: (config, modules, what reads a part of a module) -> module -> group. Raises
            `ThetaError` where that cannot be told.
        missing: what to say when parameters, or shared tensors, are missing that PEFT can be told to leave out.
        repeats_ties: θ of an embedding is saved under the name of what is tied to it as well.
        fields: of the config, that the formula needs.
        inert: of the config, that have no effect on a trained adapter.
        settings: what the formula needs besides θ, for one module: (config, module, shapes of the parts) -> settings.
            Raises `ThetaError` or `AdapterConfigError` when config and shapes disagree.
    """

    peft_type: str
    parameters: Mapping[str, str]
    mark: str
    flag: str | None = None
    when: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    grouped: Mapping[str, str] = field(default_factory=dict)
    groups: Groups = _no_groups
    missing: str | None = None
    repeats_ties: bool = False
    fields: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()
    settings: Callable[[Mapping[str, Any], str, Shapes], dict[str, Any]] = _no_settings


def save_again(setting: str) -> str:
    """The cure for a saved adapter that lacks what PEFT draws: it is drawn while PEFT loads the adapter.

    Setting the field on a loaded model has no effect: what is saved was settled when its layers were made.
    """
    return (
        f'set "{setting}" to true in its adapter_config.json, load it with PEFT on the base, the machine and the '
        "versions of the training, despite the warning about missing keys, and save it again"
    )


def number(config: Mapping[str, Any], name: str) -> float:
    """A field of the config that is a finite number. Raises `AdapterConfigError`."""
    return as_number(name, config[name])


def integer(config: Mapping[str, Any], name: str, low: int) -> int:
    """A field of the config that is an integer of at least `low`. Raises `AdapterConfigError`."""
    return as_integer(name, config[name], low)


def boolean(config: Mapping[str, Any], name: str) -> bool:
    """A field of the config that is true or false. Raises `AdapterConfigError`."""
    return as_boolean(name, config[name])


def as_boolean(name: str, value: Any) -> bool:
    """`value` if it is true or false. Raises `AdapterConfigError`."""
    if not isinstance(value, bool):
        raise AdapterConfigError(f"{name} = {value!r}; expected true or false")
    return value


def as_number(name: str, value: Any) -> float:
    """`value` if it is a finite number. Raises `AdapterConfigError`."""
    if type(value) not in (int, float) or not abs(value) < float("inf"):
        raise AdapterConfigError(f"{name} = {value!r}; expected a finite number")
    return float(value)


def as_integer(name: str, value: Any, low: int) -> int:
    """`value` if it is an integer of at least `low`. Raises `AdapterConfigError`."""
    if type(value) is not int or value < low:
        raise AdapterConfigError(f"{name} = {value!r}; expected an integer of at least {low}")
    return value


def rank_of(config: Mapping[str, Any], module: str, found: int | None) -> int:
    """r of one module, by `rank_pattern` or `r`.

    Args:
        config: of the adapter.
        module: its name.
        found: r by the shapes of θ; None where they do not say it.

    Raises:
        AdapterConfigError: a field does not have PEFT's form.
        ThetaError: config and shapes disagree.
    """
    wanted = as_integer("r", _by_pattern(config, "rank_pattern", module, config["r"]), low=1)
    if found not in (None, wanted):
        raise ThetaError(f"{module}: θ has r = {found}, the config says r = {wanted}; they disagree")
    return wanted


def alpha_over_r(config: Mapping[str, Any], module: str, found: int | None) -> float:
    """`alpha / r` of one module; arguments and errors as of `rank_of`."""
    alpha = as_number("alpha", _by_pattern(config, "alpha_pattern", module, config["alpha"]))
    return alpha / rank_of(config, module, found)


def _by_pattern(config: Mapping[str, Any], name: str, module: str, default: Any) -> Any:
    """The value of the first pattern that names `module` (`peft/utils/other.py`, `get_pattern_key`)."""
    table = config.get(name) or {}
    if not isinstance(table, dict):
        raise AdapterConfigError(f"{name} = {table!r}; expected an object")
    found = first_match(table, module)
    return default if found is None else table[found]


def first_match(patterns: Mapping[str, Any], module: str) -> str | None:
    """The first pattern that names `module`. Raises `AdapterConfigError` for one that is no regular expression."""
    try:
        return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)
    except re.error as error:
        raise AdapterConfigError(f"a pattern is not a valid regular expression ({error})") from None
