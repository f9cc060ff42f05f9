"""HF PEFT's own PEANuT folders (`peft_type: PEANUT`, PEFT ≥ 0.19), as `save_pretrained` writes them.

Keys are `base_model.model.<module>.peanut_{A,B}.weight` and `...peanut_{encoders,decoders}.<i>.weight`, with
A (r, out), B (out, r) and inner layers (r, r): the columns orientation (`peft/tuners/peanut/layer.py`).
`modules_to_save` appear as `base_model.model.<module>.<parameter>`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.activations import ACTIVATIONS, WITH_UNSAVED_PARAMETERS
from converters.adapter import Adapter, ModuleTheta, digest_of
from converters.errors import AdapterConfigError, LayoutError, ThetaError
from converters.identity import read_base_record
from converters.json_files import read_json
from converters.targeting import Targeting
from converters.theta_store import ThetaStore, open_store
from converters.tweaker import Orientation

LAYOUT = "hf-peft"
CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

_PREFIX = "base_model.model."
_THETA_KEY = re.compile(r"(?P<module>.+)\.peanut_(?P<part>A|B|encoders|decoders)(?:\.(?P<index>\d+))?\.weight")

# the fields of PeanutConfig; the first group is the mathematics, the last has no effect on a trained adapter
_MATH_FIELDS = {"r", "depth", "act_fn", "scaling"}
_TARGET_FIELDS = {
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
}
_OTHER_FIELDS = {
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

# the output and input embeddings that PEFT saves by itself when the vocabulary was resized
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|lm_head|wte|word_embeddings|shared|embed_in|embed_out)\.(weight|bias)")


def claims(folder: Path) -> str | None:
    """The evidence that `folder` was written by PEFT, or None. Raises `LayoutError` for another PEFT type."""
    if not (folder / CONFIG_NAME).is_file():
        return None
    found = _read_config(folder).get("peft_type")
    if found == "PEANUT":
        return f"{CONFIG_NAME} says peft_type PEANUT"
    if found == "LORA":
        raise LayoutError(
            f"{folder} says peft_type LORA, wanted PEANUT: a LoRA adapter is read by PEFT, vLLM and mergekit as it "
            "is; an adapter from the PEANuT authors' LLM code also says LORA, and this version does not read it"
        )
    raise LayoutError(f"{folder} says peft_type {found}, wanted PEANUT; merge it with PEFT's merge_and_unload")


def read(folder: Path, evidence: str) -> Adapter:
    """The adapter in `folder`.

    Raises:
        AdapterConfigError: invalid or unknown settings, or ones that disagree with the weights.
        ThetaError: weights are missing, extra, misshapen, damaged or not finite.
    """
    config = _read_config(folder)
    _check_config(folder, config)
    store = open_store(folder, SAFETENSORS_NAME, PICKLE_NAME)
    parts, saved = _split_keys(folder, store)
    targeting = _targeting(folder, config)
    modules = {name: _module(name, keys, store, config) for name, keys in sorted(parts.items())}
    if targeting is not None:
        _check_targeting(folder, targeting, modules, saved)
    auto_mapping = config.get("auto_mapping") or {}
    from_transformers = str(auto_mapping.get("parent_library", "")).startswith("transformers.")
    return Adapter(
        folder=folder,
        layout=LAYOUT,
        evidence=evidence,
        store=store,
        modules=modules,
        saved=saved,
        targeting=targeting,
        digest=_digest(store, config, modules, saved),
        base_name=config.get("base_model_name_or_path") or None,
        base_revision=config.get("revision") or None,
        task_type=config.get("task_type") or None,
        model_class=auto_mapping.get("base_model_class") if from_transformers else None,
        base_fingerprint=read_base_record(folder),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG_NAME, "adapter config", AdapterConfigError)


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    where = folder / CONFIG_NAME
    unknown = set(config) - _MATH_FIELDS - _TARGET_FIELDS - _OTHER_FIELDS
    risky = sorted(key for key in unknown if config[key] not in (None, [], {}))
    if risky:
        raise AdapterConfigError(
            f"{where}: '{risky[0]}' = {config[risky[0]]!r} is not a setting of PEANuT known to this version, and may "
            "change the mathematics; if it does not, remove it from the file"
        )
    if missing := sorted(_MATH_FIELDS - set(config)):
        raise AdapterConfigError(f"{where}: '{missing[0]}' is missing")
    for key in ("base_model_name_or_path", "revision", "task_type", "auto_mapping"):
        kind = dict if key == "auto_mapping" else str
        if not isinstance(config.get(key), kind | None):
            raise AdapterConfigError(f"{where}: {key} = {config[key]!r}; wanted a {kind.__name__} or null")
    for key, low in (("r", 1), ("depth", 0)):
        value = config[key]
        if type(value) is not int or value < low:
            raise AdapterConfigError(f"{where}: {key} = {value!r}; wanted an integer of at least {low}")
    scaling = config["scaling"]
    if type(scaling) not in (int, float) or not abs(scaling) < float("inf"):
        raise AdapterConfigError(f"{where}: scaling = {scaling!r}; wanted a finite number")
    act_fn = config["act_fn"]
    if not isinstance(act_fn, str):
        raise AdapterConfigError(f"{where}: act_fn = {act_fn!r}; wanted the name of an activation")
    if act_fn in WITH_UNSAVED_PARAMETERS:
        raise AdapterConfigError(
            f"{where}: act_fn '{act_fn}' has trained parameters of its own, and PEFT did not save them; "
            "this adapter cannot be restored"
        )
    if act_fn not in ACTIVATIONS:
        raise AdapterConfigError(f"{where}: act_fn {act_fn!r} is unknown; known are {', '.join(sorted(ACTIVATIONS))}")


def _targeting(folder: Path, config: Mapping[str, Any]) -> Targeting | None:
    names: dict[str, Any] = {key: config.get(key) for key in _TARGET_FIELDS}
    for key, value in names.items():
        items = value if isinstance(value, list) else [] if value is None else [value]
        kind = int if key == "layers_to_transform" else str
        if any(type(item) is not kind for item in items):
            raise AdapterConfigError(f"{folder / CONFIG_NAME}: {key} = {value!r} is not of PEFT's form")
    if names["target_modules"] is None:
        return None
    targeting = Targeting(**(names | {"modules_to_save": names["modules_to_save"] or ()}))
    try:
        targeting.matches("model.layers.0.self_attn.q_proj")
    except re.error as error:
        raise AdapterConfigError(f"{folder / CONFIG_NAME}: a pattern is no regular expression ({error})") from None
    return targeting


def _split_keys(folder: Path, store: ThetaStore) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """θ keys by module and part (`A`, `encoders.0`, ...), and the tensors of `modules_to_save`."""
    parts: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for key in store.shapes:
        if not key.startswith(_PREFIX):
            raise ThetaError(f"{folder}: the key {key} does not begin with {_PREFIX}, as PEFT's keys do")
        name = key[len(_PREFIX) :]
        if found := _THETA_KEY.fullmatch(name):
            index = found["index"]
            if (index is None) == (found["part"] in ("encoders", "decoders")):
                raise ThetaError(f"{folder}: the key {key} is not of PEFT's form")
            part = found["part"] if index is None else f"{found['part']}.{int(index)}"
            parts.setdefault(found["module"], {})[part] = key
        elif "peanut_" in name:
            raise ThetaError(f"{folder}: the key {key} is not of PEFT's form")
        else:
            saved[name] = key
    if not parts:
        raise ThetaError(f"{folder}: the weights hold no θ (no key with peanut_A); nothing to merge")
    return parts, saved


def _module(name: str, keys: dict[str, str], store: ThetaStore, config: Mapping[str, Any]) -> ModuleTheta:
    """θ of one module, held against the config's r and depth."""
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
            raise ThetaError(f"{name}: peanut_{part} has shape {found}, wanted {expected} (r = {r} in the config)")
    return ModuleTheta(
        Orientation.COLUMNS,
        keys["A"],
        keys["B"],
        tuple(keys[f"encoders.{i}"] for i in range(depth)),
        tuple(keys[f"decoders.{i}"] for i in range(depth)),
        r,
        size,
        config["act_fn"],
        float(config["scaling"]),
    )


def _check_targeting(
    folder: Path, targeting: Targeting, modules: Mapping[str, ModuleTheta], saved: Mapping[str, str]
) -> None:
    for module in modules:
        if not targeting.matches(module):
            raise AdapterConfigError(
                f"{folder}: the weights adapt {module}, the config's target_modules do not; config and weights are "
                "of different trainings"
            )
    for name in saved:
        if not targeting.saves(name.rpartition(".")[0]) and not _EMBEDDING.fullmatch(name):
            raise ThetaError(f"{folder}: {name} is neither θ nor in modules_to_save of the config")
    if targeting.modules_to_save and not saved:
        raise ThetaError(
            f"{folder}: modules_to_save is {list(targeting.modules_to_save)}, but the weights hold none of them"
        )


def _digest(
    store: ThetaStore, config: Mapping[str, Any], modules: Mapping[str, ModuleTheta], saved: Mapping[str, str]
) -> str:
    facts = {key: config[key] for key in ("act_fn", "r", "depth")}
    facts |= {"scaling": float(config["scaling"]), "orientation": Orientation.COLUMNS.value}
    names = {key: key for theta in modules.values() for key in theta.keys} | {
        key: name for name, key in saved.items()
    }
    return digest_of(store, names, facts)
