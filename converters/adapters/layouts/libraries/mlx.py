"""LoRA and DoRA of mlx-lm: `adapters.safetensors` beside an `adapter_config.json` that states no `peft_type`.

lora_a (in, r), lora_b (r, out): `W0 + s · (lora_a lora_b)ᵀ`, with s = `scale` of `lora_parameters`, not divided by r;
DoRA has m (out,) besides. A module's name is the one of MLX's model, which for most language models is that of
transformers. The config holds every option of the training command; `load_adapters` reads `fine_tune_type`,
`num_layers` and `lora_parameters`.
Source: mlx-lm's `mlx_lm/tuner/{lora,dora,utils}.py` and `mlx_lm/lora.py`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.adapters.adapter import Adapter, ModuleTheta
from converters.adapters.layouts.layout import Layout, build_adapter
from converters.adapters.layouts.libraries.transposed_store import TransposedStore
from converters.adapters.layouts.peft_config import boolean, integer, is_off, number
from converters.adapters.source import AdapterSource
from converters.errors import AdapterConfigError, LayoutError, MissingScalingError, OptionError, ThetaError
from converters.files.names import ADAPTER_CONFIG
from converters.methods.multiplicative.dora import Dora
from converters.methods.peanut.theta import Orientation
from converters.methods.peanut.tweaker import Tweaker

_PARTS = {"lora_a": "A", "lora_b": "B", "m": "magnitude_vector"}
_KEY = re.compile(r"(?P<module>.+)\.(?P<parameter>lora_a|lora_b|m)")
_FIRST_KEY = re.compile(r".+\.lora_a")  # torchtune's end in .weight

_PARAMETERS = {"rank", "scale", "dropout", "keys", "alpha"}  # fields of `lora_parameters`
_ABOUT_LORA = {"lora_parameters", "lora_layers", "use_dora"}  # fields of the config whose name speaks of LoRA

# modules that look rows up: their weight is lora_a lora_b, not its transpose
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "tok_embeddings", "embed_in", "embeddings")


def claims(source: AdapterSource) -> str | None:
    """A config with mlx-lm's fields, or its keys."""
    if source.config is not None:
        if source.peft_type == "None" and {"lora_parameters", "fine_tune_type"} & set(source.config):
            return f"{ADAPTER_CONFIG} has mlx-lm's settings, and no peft_type"
        return None
    return "keys lora_a, lora_b, as mlx-lm has them" if any(map(_FIRST_KEY.fullmatch, source.keys)) else None


def read(source: AdapterSource, evidence: str, scaling: float | None) -> Adapter:
    """The adapter in `source`.

    Raises:
        LayoutError: full fine-tuning, or LoRA on what is no linear layer.
        AdapterConfigError: invalid or unknown settings, or ones that disagree with the weights.
        ThetaError: weights are missing, extra, misshapen, damaged or not finite.
        OptionError: `scaling` is superfluous; or missing (`MissingScalingError`).
    """
    config, where = source.config or {}, source.config_path or source.path
    if source.config is not None:
        if scaling is not None:
            raise OptionError(f"scaling={scaling:g}: {where} states the scale; leave it out")
        has_magnitudes, (rank, s) = _is_dora(where, config), _rank_and_scale(where, config)
    elif scaling is not None:
        has_magnitudes, rank, s = any(name.endswith(".m") for name in source.keys), None, scaling
    else:
        raise MissingScalingError(
            f"{source.path} has no {ADAPTER_CONFIG}, and only that states the scale: give scaling=, or put the "
            "config of the training beside the weights"
        )
    modules = {
        module: _theta_of(source, module, keys, has_magnitudes, s) for module, keys in sorted(_sort(source).items())
    }
    factors = [key for theta in modules.values() for part, key in theta.parts.items() if part in ("A", "B")]
    store = TransposedStore(source.store, factors)
    for module, theta in modules.items():
        found = store.shapes[theta.parts["A"]][0]
        if rank not in (None, found):
            raise ThetaError(f"{module}: lora_a has {found} columns, the config says rank = {rank}; they disagree")
    return build_adapter(source, LAYOUT.name, evidence, modules, {}, store, base_name=config.get("model") or None)


LAYOUT = Layout("mlx", claims, read)


def _is_dora(where: Path, config: Mapping[str, Any]) -> bool:
    """Whether the config says DoRA rather than LoRA.

    Raises `LayoutError` for full fine-tuning, and `AdapterConfigError` for what is not known.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise LayoutError(
            f"{where}: fine_tune_type is full: the file has whole weights of some layers, not an adapter; fuse them "
            "with mlx_lm.fuse"
        )
    if kind not in ("lora", "dora"):
        raise AdapterConfigError(f"{where}: fine_tune_type = {kind!r}; known are lora and dora")
    if config.get("model") is not None and not isinstance(config["model"], str):
        raise AdapterConfigError(f"{where}: model = {config['model']!r}; expected a name")
    # all others are options of the training command, which `load_adapters` does not read
    about = sorted(key for key in config if "lora" in key or "dora" in key)
    for key in about:
        if key not in _ABOUT_LORA and not is_off(config[key]):
            raise _unknown(where, key, config[key])
    return kind == "dora" or boolean(where, "use_dora", config.get("use_dora") or False)


def _rank_and_scale(where: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    """r and s. Raises `AdapterConfigError`."""
    fields = config.get("lora_parameters")
    if not isinstance(fields, dict):
        raise AdapterConfigError(f"{where}: lora_parameters = {fields!r}; expected an object with rank and scale")
    for key, value in fields.items():
        if key not in _PARAMETERS and not is_off(value):
            raise _unknown(where, f"lora_parameters.{key}", value)
    for key in ("rank", "scale"):
        if key not in fields:
            raise AdapterConfigError(f"{where}: '{key}' is missing in lora_parameters")
    rank, scale = integer(where, "rank", fields["rank"], 1), number(where, "scale", fields["scale"])
    if fields.get("alpha") not in (None, rank):
        raise AdapterConfigError(
            f"{where}: lora_parameters has alpha = {fields['alpha']!r} and rank = {rank}: the first versions of "
            "mlx-lm multiply scale by alpha / rank, later ones do not read alpha; put what it was trained with into "
            "scale, and remove alpha"
        )
    return rank, scale


def _unknown(where: Path, key: str, value: Any) -> AdapterConfigError:
    return AdapterConfigError(
        f"{where}: '{key}' = {value!r} is not a setting known to this version, and may change the mathematics; if it "
        "does not, remove it from the file"
    )


def _sort(source: AdapterSource) -> dict[str, dict[str, str]]:
    """Module -> part of θ -> key. Raises `ThetaError` for a key that is not mlx-lm's."""
    modules: dict[str, dict[str, str]] = {}
    for name, key in source.keys.items():
        found = _KEY.fullmatch(name)
        if found is None:
            raise ThetaError(
                f"{source.weights}: the key {key} is not one of LoRA or DoRA as mlx-lm saves them (lora_a, lora_b, m)"
            )
        modules.setdefault(found["module"], {})[_PARTS[found["parameter"]]] = key
    if not modules:
        raise ThetaError(f"{source.weights}: there is no θ (no key with lora_a), so there is nothing to merge")
    return modules


def _theta_of(
    source: AdapterSource, module: str, keys: Mapping[str, str], has_magnitudes: bool, s: float
) -> ModuleTheta:
    """θ of one module. Raises `LayoutError` or `ThetaError`."""
    wanted = [name for name in _PARTS if has_magnitudes or name != "m"]
    if missing := [name for name in wanted if _PARTS[name] not in keys]:
        raise ThetaError(f"{source.path}: {module}: {missing[0]} is missing; the adapter is incomplete")
    if len(keys) > len(wanted):
        raise ThetaError(f"{source.path}: {module} has m, which DoRA has, and the config says LoRA; they disagree")
    a, b = (source.store.shapes[keys[part]] for part in ("A", "B"))
    if module.rsplit(".", 1)[-1] in _EMBEDDINGS:
        raise LayoutError(
            f"{source.path} has LoRA on the embedding {module}, which is not read here; use mlx_lm.fuse"
        )
    if len(a) == len(b) == 3:
        raise LayoutError(
            f"{source.path} has LoRA on the experts {module}, lora_a {a}, which are not read here; use mlx_lm.fuse"
        )
    if not len(a) == len(b) == 2 or a[1] != b[0]:
        raise ThetaError(f"{module}: lora_a has shape {a}, lora_b {b}; expected (in, r) and (r, out)")
    if has_magnitudes:
        return ModuleTheta(Dora, keys, {"scaling": s})
    return ModuleTheta(Tweaker, keys, {"orientation": Orientation.FREE.value, "act_fn": "linear", "scaling": s})
