"""What every adapter_config.json of PEFT and its forks has in common: how fields are checked, what they target."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converters.adapters.layouts.peft_keys import EMBEDDING_NAMES
from converters.adapters.layouts.peft_parts.lora_fields import SINCE
from converters.adapters.targeting import DEFAULT_HEADS, Targeting
from converters.errors import AdapterConfigError, ThetaError
from converters.methods.peft_form import as_boolean, as_integer, as_number

TARGET_FIELDS = frozenset(
    {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"}
)
# no effect on a trained adapter
INERT_FIELDS = frozenset(
    {
        "peft_type",
        "peft_version",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "init_weights",
        "runtime_config",
    }
)

# inside of a trained copy of a module
_COPY = re.compile(r"(^|\.)(modules_to_save|original_module)\.")

# the output and input embeddings that PEFT saves by itself when the vocabulary was resized
_EMBEDDING = re.compile(rf"(.*\.)?({EMBEDDING_NAMES})\.(weight|bias)")


# fields of HF PEFT that are refused where they are on, and in every config of their type
_OFF_BY_DEFAULT = frozenset({*SINCE, "target_svd_config"})


def is_off(value: Any) -> bool:
    """Whether the value of a field turns nothing on: null, false, zero, or empty."""
    return value is None or (isinstance(value, bool | int | float | str | list | dict) and not value)


def check_fields(
    where: Path, config: Mapping[str, Any], math: Collection[str], inert: Collection[str] = ()
) -> tuple[str, ...]:
    """Refuse a config that lacks a field of the mathematics (`math`), or has one that is on and not known.

    Returns notes on unknown fields that are off. Raises `AdapterConfigError`.
    """
    unknown = set(config) - set(math) - TARGET_FIELDS - INERT_FIELDS - set(inert)
    risky = sorted(key for key in unknown if not is_off(config[key]))
    if risky:
        raise AdapterConfigError(
            f"{where}: '{risky[0]}' = {config[risky[0]]!r} is not a setting known to this version, and may "
            "change the mathematics; if it does not, remove it from the file"
        )
    if missing := sorted(set(math) - set(config)):
        raise AdapterConfigError(f"{where}: '{missing[0]}' is missing")
    for key in ("base_model_name_or_path", "revision", "task_type", "auto_mapping"):
        kind = dict if key == "auto_mapping" else str
        if not isinstance(config.get(key), kind | None):
            raise AdapterConfigError(f"{where}: {key} = {config[key]!r}; expected a {kind.__name__} or null")
    strange = ", ".join(f"'{key}' = {config[key]!r}" for key in sorted(unknown - _OFF_BY_DEFAULT))
    if not strange:
        return ()
    return (f"{where}: this version does not know {strange}; by its value it is off, and it was left out of account",)


def adapts_nothing(config: Mapping[str, Any] | None) -> bool:
    """Whether a config says that no module is adapted, so that all that was trained replaces tensors.

    `get_peft_model` accepts an adapter without target modules by the constant DUMMY_TARGET_MODULES only.
    """
    if config is None or config.get("target_parameters"):
        return False
    return config.get("target_modules") in ([], "dummy-target-modules")


@contextmanager
def located(where: Path | None) -> Iterator[None]:
    """Name the file in an `AdapterConfigError` that is raised inside."""
    try:
        yield
    except AdapterConfigError as error:
        raise AdapterConfigError(f"{where}: {error}") from None


def integer(where: Path, name: str, value: Any, low: int) -> int:
    """`value` if it is an integer of at least `low`. Raises `AdapterConfigError`."""
    with located(where):
        return as_integer(name, value, low)


def number(where: Path, name: str, value: Any) -> float:
    """`value` if it is a finite number. Raises `AdapterConfigError`."""
    with located(where):
        return as_number(name, value)


def boolean(where: Path, name: str, value: Any) -> bool:
    """`value` if it is true or false. Raises `AdapterConfigError`."""
    with located(where):
        return as_boolean(name, value)


def trained_biases(where: Path, config: Mapping[str, Any]) -> str:
    """Which biases were trained: `none`, `all`, or `lora_only`, those of the adapted modules, of whatever method."""
    bias = config.get("bias") or "none"
    if isinstance(bias, str) and bias.endswith("_only"):
        return "lora_only"
    if bias not in ("none", "all"):
        raise AdapterConfigError(f"{where}: bias = {bias!r}; expected none, all, or <method>_only")
    return str(bias)


def provenance(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Adapter` that describe the training."""
    auto_mapping = config.get("auto_mapping") or {}
    from_transformers = str(auto_mapping.get("parent_library", "")).split(".")[0] == "transformers"
    return {
        "base_name": config.get("base_model_name_or_path") or None,
        "base_revision": config.get("revision") or None,
        "task_type": config.get("task_type") or None,
        "model_class": auto_mapping.get("base_model_class") if from_transformers else None,
    }


def targeting_of(where: Path, config: Mapping[str, Any]) -> Targeting | None:
    """What the config says is adapted, if it says so. Raises `AdapterConfigError` for fields not of PEFT's form."""
    names: dict[str, Any] = {key: config.get(key) for key in TARGET_FIELDS}
    for key, value in names.items():
        items = value if isinstance(value, list) else [] if value is None else [value]
        kind = int if key == "layers_to_transform" else str
        if any(type(item) is not kind for item in items):
            raise AdapterConfigError(f"{where}: {key} = {value!r} does not have PEFT's form")
    if names["target_modules"] is None:
        return None
    targeting = Targeting(**(names | {"modules_to_save": names["modules_to_save"] or ()}))
    try:
        targeting.matches("model.layers.0.self_attn.q_proj")
    except re.error as error:
        raise AdapterConfigError(f"{where}: a pattern is not a valid regular expression ({error})") from None
    return targeting


def check_targeting(
    where: Path,
    targeting: Targeting,
    modules: Collection[str],
    saved: Collection[str],
    bias: str = "none",
) -> None:
    """Check the weights against what the config targets.

    Args:
        where: what to name in errors.
        targeting: the config's.
        modules: those that the weights adapt.
        saved: names of tensors that are replaced whole.
        bias: LoRA's `bias`: `none`, `all`, or `lora_only` (those of the adapted modules).

    Raises:
        AdapterConfigError: a module has θ that the config does not target.
        ThetaError: a tensor nobody asked for, or modules_to_save without tensors.
    """
    for module in modules:
        if _COPY.search(module) or targeting.saves(module):
            raise ThetaError(
                f"{where}: the weights adapt {module}, and modules_to_save {list(targeting.modules_to_save)} of the "
                "config replaces it (PEFT takes every module whose name ends with an entry); PEFT does not load such "
                "an adapter again, so what it means is not defined; train with either of the two"
            )
        if not targeting.matches(module):
            raise AdapterConfigError(
                f"{where}: the weights adapt {module}, the config's target_modules do not; config and weights come "
                "from different trainings"
            )
    whole = set()
    for name in saved:
        module, _, parameter = name.rpartition(".")
        if targeting.saves(module) or _EMBEDDING.fullmatch(name):
            whole.add(name)
        elif parameter != "bias" or bias == "none" or (bias == "lora_only" and module not in modules):
            raise ThetaError(f"{where}: {name} is neither θ nor in modules_to_save of the config")
    defaults = {head for heads in DEFAULT_HEADS.values() for head in heads}  # which the model may not have
    if set(targeting.modules_to_save) - defaults and not whole:
        raise ThetaError(
            f"{where}: modules_to_save is {list(targeting.modules_to_save)}, but the weights contain none of them"
        )
