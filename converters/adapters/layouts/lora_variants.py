"""Variants of LoRA: a LoraConfig with a flag, and parameters beside lora_A and lora_B. DoRA is one.

Which there are, their methods say (`converters/methods/table.py`).
"""

from collections.abc import Mapping

from converters.adapters.source import AdapterSource
from converters.errors import AdapterConfigError, ThetaError
from converters.methods.base import Method
from converters.methods.peft_form import PeftForm
from converters.methods.table import LORA_VARIANTS

_PLAIN = {"lora_A": "A", "lora_B": "B"}

# parameter in a state dict -> part of θ, of LoRA and of all its variants
PARTS: Mapping[str, str] = {
    **_PLAIN,
    **{name: part for _, form in LORA_VARIANTS.values() for name, part in form.parameters.items()},
}


def find_variant(source: AdapterSource) -> tuple[type[Method], PeftForm] | None:
    """The variant that a source is of, by the config's flag or else by its keys; None for plain LoRA."""
    for flag, (method, form) in LORA_VARIANTS.items():
        own = [f".{name}" for name in form.parameters if name not in _PLAIN]
        if (source.config or {}).get(flag) or any(mark in key for key in source.keys for mark in own):
            return method, form
    return None


def check_parts(source: AdapterSource, module: str, parts: Mapping[str, str]) -> None:
    """Check that a module has the parts of θ that its variant needs.

    Raises:
        ThetaError: one is missing.
        AdapterConfigError: the weights are of a variant that the config does not turn on.
    """
    found = find_variant(source)
    if found is None:
        return
    _, form = found
    if missing := [name for name, part in form.parameters.items() if part not in parts]:
        raise ThetaError(f"{module}: {missing[0]} is missing; the adapter is incomplete")
    if source.config is not None and not source.config.get(str(form.flag)):
        raise AdapterConfigError(
            f"{source.config_path}: {form.flag} is off, but the weights contain parameters of that variant of LoRA; "
            "config and weights come from different trainings"
        )
