"""How HF PEFT saves a method's θ: what `converters/adapters/layouts/` needs to know to read it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]  # part of θ -> its shape


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
        fields: of the config, that the formula needs.
        inert: of the config, that have no effect on a trained adapter.
        settings: what the formula needs besides θ, for one module: (config, module, shapes of the parts) -> settings.
            Raises `ThetaError` when config and shapes disagree.
    """

    peft_type: str
    parameters: Mapping[str, str]
    mark: str
    flag: str | None = None
    fields: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()
    settings: Callable[[Mapping[str, Any], str, Shapes], dict[str, Any]] = _no_settings
