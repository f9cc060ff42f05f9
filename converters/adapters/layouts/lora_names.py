"""θ under LoRA's names, `lora_A` and `lora_B`: what plain LoRA and the PEANuT authors' LLM code both write.

Both say `peft_type: LORA`. Plain LoRA has lora_A (r, in) and lora_B (out, r); the authors' code has lora_A (r, in)
and lora_B (in, r). Where `out = in`, nothing in the folder distinguishes them. A variant of LoRA (DoRA is one) is a
LoraConfig with a flag, and parameters beside lora_A and lora_B; which there are, `converters/methods/table.py` says.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from converters.adapters.adapter import Adapter, ModuleTheta
from converters.adapters.layouts.layout import build_adapter
from converters.adapters.layouts.peft_config import (
    adapts_nothing,
    boolean,
    check_fields,
    check_targeting,
    provenance,
    targeting_of,
)
from converters.adapters.layouts.peft_keys import sort_keys
from converters.adapters.layouts.peft_parts.embeddings import (
    EMBEDDING_PARAMETERS,
    find_tied_heads,
    is_embedding,
    read_embedding,
)
from converters.adapters.layouts.peft_parts.stacked import on_stacked_layers
from converters.adapters.layouts.peft_parts.tokens import TOKENS, TOKENS_FIELD, TOKENS_PARAMETER, read_tokens
from converters.adapters.source import AdapterSource
from converters.errors import AdapterConfigError, LayoutError, MissingScalingError, OptionError, ThetaError
from converters.files.names import ADAPTER_CONFIG
from converters.methods.base import Method
from converters.methods.lora.expert_lora import ExpertLora
from converters.methods.peft_form import PeftForm
from converters.methods.table import LORA_VARIANTS

_PLAIN = {"lora_A": "A", "lora_B": "B"}

# parameter in a state dict -> part of θ, of LoRA and of all its variants, and of trained tokens beside it
PARTS: Mapping[str, str] = {
    **_PLAIN,
    TOKENS_PARAMETER: TOKENS,
    **EMBEDDING_PARAMETERS,
    **{name: part for _, form in LORA_VARIANTS.values() for name, part in form.parameters.items()},
}

_LORA_KEY = re.compile(r".+\.lora_[AB]\..*weight")

# variants that differ from LoRA in the training alone: field of the config -> keys that are left behind
_OF_TRAINING = {
    "velora_config": r".+\.lora_velora_embed(\.[^.]+)?",
    "monteclora_config": r".+\.lora_monteclora_sampler\..+",
}

# fields that are checked here, of the training, or without meaning unless a setting that is refused says so
INERT_FIELDS = (
    *LORA_VARIANTS,
    *_OF_TRAINING,
    "fan_in_fan_out",
    "bias",
    "lora_dropout",
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "layer_replication",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
    "merge_weights",
)

# keys and settings of what is not plain LoRA -> its name
_VARIANT_KEYS = {
    r".*\.lora_A(\..*)?\.bias": "LoRA with a bias on A",
}
_VARIANT_FIELDS = {"enable_lora": "LoRA's MergedLinear"}

ThetaOf = Callable[[str, Mapping[str, str], float, bool], ModuleTheta]
ScalingOf = Callable[[str, int], float]


def find_shapes(source: AdapterSource) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """Module -> shapes of its lora_A and lora_B, or None if there are no LoRA names in it.

    Raises `LayoutError` for a variant of LoRA that is not read.
    """
    if source.peft_type not in ("LORA", None) or adapts_nothing(source.config):
        return None
    if source.config is None and not any(_LORA_KEY.fullmatch(name) for name in source.keys):
        return None
    _refuse_variants(source)
    sorted_keys = sort_keys(source, PARTS, "lora_", ignored=_left_behind(source))
    parts = {m: keys for m, keys in sorted_keys.parts.items() if _is_linear(keys)}
    shapes = source.store.shapes
    for module, keys in parts.items():
        if missing := {"A", "B"} - set(keys):
            raise ThetaError(f"{module}: lora_{missing.pop()} is missing; the adapter is incomplete")
    return {module: (shapes[keys["A"]], shapes[keys["B"]]) for module, keys in parts.items()}


def _is_linear(parts: Mapping[str, str]) -> bool:
    """Whether a module has LoRA, rather than trained tokens, or LoRA of an embedding."""
    return TOKENS not in parts and not is_embedding(parts)


def find_variant(source: AdapterSource) -> tuple[type[Method], PeftForm] | None:
    """The variant that a source is of, by the config's flag or else by its keys; None for plain LoRA.

    Raises `AdapterConfigError` for several at once.
    """
    flags = [flag for flag in LORA_VARIANTS if (source.config or {}).get(flag)]
    if len(flags) > 1:
        raise AdapterConfigError(
            f"{source.config_path}: {' and '.join(flags)} are variants of LoRA that HF PEFT does not combine, or "
            "that are not read together; merge it with PEFT's merge_and_unload, if PEFT loads it"
        )
    if flags:
        return LORA_VARIANTS[flags[0]]
    modules = sort_keys(source, PARTS, "lora_", ignored=_left_behind(source)).parts
    found = {part for parts in modules.values() for part in parts}
    own = (variant for variant in LORA_VARIANTS.values() if found & {*variant[1].parameters.values()} - {"A", "B"})
    return next(own, None)


def check_parts(
    source: AdapterSource, module: str, parts: Mapping[str, str], variant: tuple[type[Method], PeftForm] | None
) -> None:
    """Check that a module has the parts of θ that its variant needs.

    Raises:
        ThetaError: one is missing.
        AdapterConfigError: the weights are of a variant that the config does not turn on.
    """
    if variant is None:
        return
    _, form = variant
    if missing := [name for name, part in form.parameters.items() if part not in parts]:
        raise ThetaError(f"{module}: {missing[0]} is missing; the adapter is incomplete")
    if source.config is not None and not source.config.get(str(form.flag)):
        raise AdapterConfigError(
            f"{source.config_path}: {form.flag} is off, but the weights contain parameters of that variant of LoRA; "
            "config and weights come from different trainings"
        )


def _check_embedding(
    source: AdapterSource, module: str, parts: Mapping[str, str], variant: tuple[type[Method], PeftForm] | None
) -> None:
    """As `check_parts`, for an embedding: PEFT has DoRA for those, and no other variant."""
    if variant is not None and variant[1].flag == "use_dora":
        check_parts(source, module, {part.removeprefix("embedding_"): key for part, key in parts.items()}, variant)


def says(source: AdapterSource) -> str:
    """The part of the evidence that both layouts share."""
    if source.config is None or source.config_path is None:
        return "keys lora_A, lora_B"
    above = "" if source.config_path.parent == source.folder else " one folder up"
    old = " and has merge_weights, as forks of old PEFTs write it" if "merge_weights" in source.config else ""
    return f"{ADAPTER_CONFIG}{above} says peft_type LORA{old}"


def _left_behind(source: AdapterSource) -> re.Pattern[str] | None:
    """What matches a key that has no effect on a trained adapter; None for nothing."""
    config = source.config
    used = [pattern for field, pattern in _OF_TRAINING.items() if config is None or config.get(field)]
    return re.compile("|".join(used)) if used else None


def _refuse_variants(source: AdapterSource) -> None:
    config = source.config or {}
    found = next((name for field, name in _VARIANT_FIELDS.items() if config.get(field)), None)
    keys = (name for name in source.keys if ".lora_" in name)
    found = found or next((v for k in keys for form, v in _VARIANT_KEYS.items() if re.fullmatch(form, k)), None)
    if found is not None:
        raise LayoutError(f"{source.path} is {found}, which is not read here; merge it with PEFT's merge_and_unload")


def read_modules(
    source: AdapterSource,
    layout: str,
    evidence: str,
    scaling: float | None,
    math: tuple[str, ...],
    inert: tuple[str, ...],
    scaling_of: Callable[[Mapping[str, Any]], ScalingOf],
    theta_of: ThetaOf,
) -> Adapter:
    """The adapter in a source with LoRA's names.

    Args:
        source: the source.
        layout, evidence: its layout, and what identified it.
        scaling: s, where no config states it.
        math, inert: fields of the config that the formula needs, and fields without effect.
        scaling_of: given the config, a function from a module and its r to s.
        theta_of: a module, its keys, s and fan_in_fan_out -> its θ.

    Raises:
        AdapterConfigError: invalid or unknown settings, or ones that disagree with the weights.
        ThetaError: weights are missing, extra, misshapen, damaged or not finite.
        OptionError: `scaling` is superfluous; or missing (`MissingScalingError`).
    """
    config, where = source.config or {}, source.config_path or source.path
    notes: tuple[str, ...] = ()
    if source.config is not None:
        notes = check_fields(where, config, math, (*inert, TOKENS_FIELD))
        if scaling is not None:
            raise OptionError(f"scaling={scaling:g}: {where} states lora_alpha and r; leave it out")
        find_scaling = scaling_of(config)
    elif scaling is not None:
        find_scaling = _always(scaling)
    else:
        raise MissingScalingError(
            f"{source.path} has no {ADAPTER_CONFIG}, and only that states s = lora_alpha / r: give scaling=, or "
            "put the config of the training beside the weights"
        )
    transposed = boolean(where, "fan_in_fan_out", config.get("fan_in_fan_out") or False)
    bias = config.get("bias") or "none"
    if bias not in ("none", "all", "lora_only"):
        raise AdapterConfigError(f"{where}: bias = {bias!r}; expected none, all or lora_only")
    keys = sort_keys(source, PARTS, "lora_", bias, ignored=_left_behind(source))
    tied_heads = find_tied_heads(source, keys.parts)
    modules = _read_updates(source, keys.parts, find_scaling, theta_of, transposed, tied_heads)
    tokens = read_tokens(source, keys.parts)
    targeting = targeting_of(where, config)
    if targeting is not None:
        whole = {m: theta for m, theta in modules.items() if theta.method is not ExpertLora and m not in tied_heads}
        check_targeting(source.path, targeting, whole, keys.saved, bias)
    facts = provenance(config) | {"target_parameters": tuple(config.get("target_parameters") or ()), "notes": notes}
    opened = build_adapter(
        source, layout, evidence, modules | tokens, keys.saved, embedded=keys.embedded, targeting=targeting, **facts
    )
    return on_stacked_layers(opened, where, config)


def _read_updates(
    source: AdapterSource,
    parts: Mapping[str, Mapping[str, str]],
    scaling_of: ScalingOf,
    theta_of: ThetaOf,
    transposed: bool,
    tied_heads: Mapping[str, str],
) -> dict[str, ModuleTheta]:
    """θ of the modules with LoRA, linear and embeddings, without heads that share an embedding's by their tie."""
    modules, variant = {}, find_variant(source)
    for module, keys in sorted(parts.items()):
        if TOKENS in keys or (module in tied_heads and set(keys) == {"A", "B"}):
            continue
        if is_embedding(keys):
            _check_embedding(source, module, keys, variant)
            keeps_ties = module in tied_heads.values()
            modules[module] = read_embedding(source, module, keys, scaling_of, keeps_ties)
            continue
        check_parts(source, module, keys, variant)
        a = source.store.shapes[keys["A"]]
        modules[module] = theta_of(module, keys, scaling_of(module, a[0] if a else 0), transposed)
    return modules


def _always(scaling: float) -> ScalingOf:
    return lambda module, r: scaling
