"""This project's own layout, `peanut_config.json` and `peanut_theta.safetensors`: for what no other can express.

It stores everything that the formula needs, per module, so that every tweaker can be saved: any
orientation, activation (also `sin_2pi`, also on the output), any depth, with residuals or without.

    peanut_config.json         {"format": "peanut", "format_version": 1, "modules": {"<module>": {
                                   "orientation": "rows" | "columns" | "free", "act_fn": "relu", "scaling": 1.0,
                                   "residual": true, "output_act_fn": null, "negative_slope": 0.01}},
                                "base_model_name_or_path", "task_type", "model_class", "labels": optional}
    peanut_theta.safetensors   theta.<module>.A  .B  .encoders.<i>  .decoders.<i>    see `Tweaker` for shapes
                               saved.<tensor>      tensors that are replaced: heads, biases, embeddings
    peanut_base.json           the base's fingerprint, if it was given
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.adapters.adapter import Adapter, ModuleTheta, check_theta
from converters.adapters.base_record import read_base_record, write_base_record
from converters.adapters.layouts.layout import Layout
from converters.adapters.layouts.peft_config import boolean, number
from converters.adapters.source import AdapterSource
from converters.adapters.store import SafetensorsStore
from converters.errors import AdapterConfigError, OptionError, OutputExistsError, ThetaError
from converters.files.json_files import read_json, write_json
from converters.files.names import NATIVE_CONFIG, NATIVE_WEIGHTS
from converters.files.places import is_empty
from converters.files.staging import staged
from converters.files.writer import save_tensors
from converters.methods.peanut.activations import known_activations
from converters.methods.peanut.theta import Orientation
from converters.methods.peanut.tweaker import Tweaker
from converters.models.checkpoint import Checkpoint

_FORMAT = {"format": "peanut", "format_version": 1}
_OPTIONAL = ("base_model_name_or_path", "task_type", "model_class", "labels")
_SETTINGS = ("orientation", "act_fn", "scaling", "residual", "output_act_fn", "negative_slope")
_THETA_KEY = re.compile(r"theta\.(?P<module>.+)\.(?P<part>A|B|(?:encoders|decoders)\.\d+)")


def save_adapter(
    folder: str | Path,
    tweakers: Mapping[str, Tweaker],
    *,
    saved: Mapping[str, Tensor] | None = None,
    labels: Sequence[str] | None = None,
    base: Checkpoint | None = None,
    base_name: str | None = None,
    task_type: str | None = None,
    model_class: str | None = None,
) -> Path:
    """Save a trained adapter in the native layout, with everything that the formula needs.

    Args:
        folder: where to; it must not exist, or be empty.
        tweakers: module name, as in `model.named_modules()` -> its θ.
        saved: name of a tensor that the adapter replaces whole, as in `model.state_dict()` -> the tensor.
        labels: class labels of a head in `saved`.
        base: the base it was trained on; its fingerprint is recorded, and every other base refused from then on.
        base_name: Hub id or name of the base.
        task_type: PEFT's task type, by which the class of the merged model is found if `saved` holds a head.
        model_class: that class itself, where a task type is not enough.

    Returns:
        the folder.

    Raises:
        ThetaError: nothing to save, or numbers that are not finite.
        OutputExistsError: `folder` exists.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and is_empty(folder)):
        raise OutputExistsError(f"{folder} exists; choose another folder")
    if not tweakers:
        raise ThetaError("no tweakers to save")
    tensors = {f"saved.{name}": tensor for name, tensor in (saved or {}).items()}
    for module, tweaker in tweakers.items():
        tensors |= {f"theta.{module}.{part}": tensor for part, tensor in tweaker.parts.items()}
    facts = {
        "base_model_name_or_path": base_name,
        "task_type": task_type,
        "model_class": model_class,
        "labels": list(labels) if labels is not None else None,
    }
    modules = {module: tweaker.settings for module, tweaker in tweakers.items()}
    with staged(folder, overwrite=False) as staging:
        # a copy each: safetensors refuses tensors that share memory
        save_tensors(
            {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, staging / NATIVE_WEIGHTS
        )
        write_json(
            staging / NATIVE_CONFIG,
            {**_FORMAT, **{key: value for key, value in facts.items() if value is not None}, "modules": modules},
        )
        if base is not None:
            write_base_record(staging, base)
        read(AdapterSource(staging), "written just now", None)  # what cannot be read back is not published
    return folder


def claims(source: AdapterSource) -> str | None:
    """The config of this layout."""
    if source.path.is_dir() and (source.path / NATIVE_CONFIG).is_file():
        return f"{NATIVE_CONFIG} is there"
    return None


def read(source: AdapterSource, evidence: str, scaling: float | None) -> Adapter:
    """The adapter in `source`.

    Raises:
        AdapterConfigError: invalid or unknown settings.
        ThetaError: weights are missing, extra, misshapen, damaged or not finite.
    """
    where = source.path / NATIVE_CONFIG
    config = read_json(where, "adapter config", AdapterConfigError)
    if scaling is not None:
        raise OptionError(f"scaling={scaling:g}: {where} states the scaling; leave it out")
    settings = _check_config(where, config)
    if not (source.path / NATIVE_WEIGHTS).is_file():
        raise ThetaError(f"{source.path}: no {NATIVE_WEIGHTS}; the adapter has a config but no weights")
    store = SafetensorsStore(source.path / NATIVE_WEIGHTS)
    parts: dict[str, dict[str, str]] = {module: {} for module in settings}
    saved = {}
    for key in store.shapes:
        match = _THETA_KEY.fullmatch(key)
        if match is not None and match["module"] in parts:
            parts[match["module"]][match["part"]] = key
        elif key.startswith("saved."):
            saved[key.removeprefix("saved.")] = key
        else:
            raise ThetaError(f"{source.path / NATIVE_WEIGHTS}: {key} belongs to no module of {NATIVE_CONFIG}")
    modules = {module: _module(module, parts[module], settings[module]) for module in sorted(settings)}
    labels = config.get("labels")
    return Adapter(
        path=source.path,
        layout=LAYOUT.name,
        evidence=evidence,
        store=store,
        modules=modules,
        saved=saved,
        digest=check_theta(store, modules, saved),
        labels=tuple(labels) if labels else None,
        repo_id=source.repo_id,
        revision=source.revision,
        base_name=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        model_class=config.get("model_class"),
        base_fingerprint=read_base_record(source.folder),
    )


LAYOUT = Layout("peanut", claims, read)


def _check_config(where: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of every module, checked."""
    for key, value in _FORMAT.items():
        if config.get(key) != value:
            raise AdapterConfigError(f"{where}: {key} = {config.get(key)!r}; this version reads {value!r}")
    if unknown := sorted(set(config) - set(_FORMAT) - set(_OPTIONAL) - {"modules"}):
        raise AdapterConfigError(f"{where}: '{unknown[0]}' is unknown to this version")
    labels = config.get("labels")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise AdapterConfigError(f"{where}: labels = {labels!r}; expected a list of strings")
    for key in _OPTIONAL[:-1]:
        if not isinstance(config.get(key), str | None):
            raise AdapterConfigError(f"{where}: {key} = {config[key]!r}; expected a string")
    modules = config.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise AdapterConfigError(f"{where}: no modules in it")
    for module, settings in modules.items():
        if not isinstance(settings, dict) or set(settings) != set(_SETTINGS):
            raise AdapterConfigError(f"{where}: {module} must have exactly the settings {', '.join(_SETTINGS)}")
        if settings["orientation"] not in [o.value for o in Orientation]:
            raise AdapterConfigError(f"{where}: {module}: orientation = {settings['orientation']!r} is unknown")
        known = [*known_activations(), None]
        for key in ("act_fn", "output_act_fn"):
            if settings[key] not in (known if key == "output_act_fn" else known[:-1]):
                raise AdapterConfigError(f"{where}: {module}: {key} = {settings[key]!r}; known are {known}")
        for key in ("scaling", "negative_slope"):
            settings[key] = number(where, f"{module}: {key}", settings[key])
        boolean(where, f"{module}: residual", settings["residual"])
    return modules


def _module(module: str, parts: Mapping[str, str], settings: Mapping[str, Any]) -> ModuleTheta:
    sides = [
        sorted(int(part.split(".")[1]) for part in parts if part.startswith(s)) for s in ("encoders", "decoders")
    ]
    wanted = [
        "A",
        "B",
        *(f"encoders.{i}" for i in range(len(sides[0]))),
        *(f"decoders.{i}" for i in range(len(sides[1]))),
    ]
    if missing := [part for part in wanted if part not in parts]:
        raise ThetaError(f"{module}: {missing[0]} is missing; the adapter is incomplete")
    return ModuleTheta(Tweaker, {part: parts[part] for part in wanted}, settings)
