"""θ in state dicts of the PEANuT authors' image-classification and GLUE code (their `peanut.py`).

Their code hangs modules into a transformers model: `q_adapter` and `v_adapter` beside `query` and `value`,
`adapter` inside a dense layer. Each has A (r, out), B (out, r), and `encoders.N`, `decoders.N` (r, r) with mirrored
residuals; an older class calls the four hidden layers of depth 6 `i1` to `i4`. They compute `x (W0ᵀ + g(W0ᵀ))`, which
is the columns orientation of W0. σ is ReLU. Everything else in the state dict is the base, or the head that was
trained with θ.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.adapters.adapter import ModuleTheta
from converters.adapters.source import AdapterSource
from converters.errors import AdapterConfigError, ThetaError
from converters.files.json_files import read_json
from converters.methods.peanut.theta import Orientation
from converters.methods.peanut.tweaker import Tweaker

_THETA_KEY = re.compile(
    r"(?:(?P<parent>.+)\.)(?P<kind>q_adapter|v_adapter|adapter)"
    r"\.(?P<part>A|B|(?:encoders|decoders)\.\d+|i[1-4])\.weight"
)
_ADAPTED = {"q_adapter": "query", "v_adapter": "value"}
_NAIVE = {"i1": "encoders.0", "i2": "encoders.1", "i3": "decoders.0", "i4": "decoders.1"}


@dataclass
class AuthorsKeys:
    """The keys of such a state dict, sorted.

    Attributes:
        parts: adapted module -> part of θ (`A`, `encoders.0`, ...) -> key in the store.
        head: tensor of the trained head -> key.
        embedded: base tensor that was saved along -> key.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    head: dict[str, str] = field(default_factory=dict)
    embedded: dict[str, str] = field(default_factory=dict)


def sort_keys(source: AdapterSource) -> AuthorsKeys | None:
    """Sort the keys of a state dict; None if there is nothing of the authors' code in it."""
    if source.config is not None:
        return None
    found, rest = AuthorsKeys(), {}
    for name, key in source.keys.items():
        match = _THETA_KEY.fullmatch(name)
        if match is None:
            rest[name] = key
            continue
        kind = match["kind"]
        module = f"{match['parent']}.{_ADAPTED[kind]}" if kind in _ADAPTED else match["parent"]
        found.parts.setdefault(module, {})[match["part"]] = key
    if not found.parts:
        return None
    first = next(iter(found.parts)).split(".")[0]
    for name, key in rest.items():
        # a model without a head has its layers at the top: then nothing can be a head
        inside = name.startswith(f"{first}.") or first in ("encoder", "layers")
        (found.embedded if inside else found.head)[name] = key
    return found


def read_modules(source: AdapterSource, keys: AuthorsKeys, scaling: float) -> dict[str, ModuleTheta]:
    """θ of every module; r and depth are read per module.

    Raises `ThetaError` for parts that are missing, or hidden layers that do not pair up.
    """
    for module in keys.parts:
        parent, _, leaf = module.rpartition(".")
        for one, other in (("query", "value"), ("value", "query")):
            if leaf == one and f"{parent}.{other}" not in keys.parts:
                raise ThetaError(
                    f"{source.path}: {module} has θ, {parent}.{other} has none; the authors' code adapts both, so "
                    "the adapter is incomplete"
                )
    return {module: _read_module(module, parts, scaling) for module, parts in sorted(keys.parts.items())}


def _read_module(module: str, parts: Mapping[str, str], scaling: float) -> ModuleTheta:
    if any(part in _NAIVE for part in parts):
        if missing := sorted(set(_NAIVE) - set(parts)):
            raise ThetaError(f"{module}: {missing[0]} of i1 to i4 is missing; the adapter is incomplete")
        parts = {_NAIVE.get(part, part): key for part, key in parts.items()}
    if missing := sorted({"A", "B"} - set(parts)):
        raise ThetaError(f"{module}: {missing[0]} is missing; the adapter is incomplete")
    for side in ("encoders", "decoders"):
        found = sorted(int(part.split(".")[1]) for part in parts if part.startswith(side))
        if found != list(range(len(found))):
            raise ThetaError(f"{module}: {side} {found} are not numbered from 0 without a gap; one is missing")
    return ModuleTheta(Tweaker, parts, {"orientation": Orientation.COLUMNS.value, "scaling": scaling})


def class_beside(folder: Path) -> str | None:
    """The class that was trained, from a config.json beside its weights (a Trainer's folder), if it names one.

    Raises `AdapterConfigError` when the config is damaged.
    """
    if not (folder / "config.json").is_file():
        return None
    names = read_json(folder / "config.json", "model config", AdapterConfigError).get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    return name if "Classification" in name else None
