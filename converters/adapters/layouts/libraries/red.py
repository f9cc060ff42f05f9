"""RED as its authors' code saves it: `delta_vector.pth`, and for a classifier `classifier.pth` beside it.

A module's keys are `<module>.delta_vector.activation_scaling` and `<module>.delta_vector.activation_bias`, (1, out)
each. The head of their RoBERTa is transformers' own: dense, tanh, out_proj on the first token.
Source: github.com/mlwu22/RED, `model.py` (`ActivationLayer`, `ClassifierHead`, `save_model`).
"""

import re

from converters.adapters.adapter import Adapter, ModuleTheta
from converters.adapters.layouts.layout import Layout, build_adapter
from converters.adapters.layouts.libraries.joined_store import JoinedStore
from converters.adapters.source import AdapterSource
from converters.adapters.store import open_store
from converters.errors import LayoutError, OptionError, ThetaError
from converters.methods.multiplicative.red import Red

_KEY = re.compile(r"(?P<module>.+)\.delta_vector\.activation_(?P<part>scaling|bias|ln\.weight|ln\.bias)")
_HEAD_FILE = "classifier.pth"
_HEAD = "classifier."
_HEAD_KEYS = frozenset({"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"})


def claims(source: AdapterSource) -> str | None:
    """Keys with `delta_vector`."""
    found = next((key for key in source.keys if _KEY.fullmatch(key)), None) if source.config is None else None
    return None if found is None else f"{source.weights.name} has keys like {found}, as the authors of RED save it"


def read(source: AdapterSource, evidence: str, scaling: float | None) -> Adapter:
    """The adapter in `source`.

    Raises:
        LayoutError: it has layers that no weight can follow.
        ThetaError: weights are missing, extra, misshapen, damaged or not finite.
        OptionError: `scaling` was given.
    """
    if scaling is not None:
        raise OptionError(f"scaling={scaling:g}: RED has no such setting; leave it out")
    parts = _sort_keys(source)
    modules = {module: ModuleTheta(Red, keys, {}) for module, keys in sorted(parts.items())}
    head = source.weights.with_name(_HEAD_FILE)
    if not head.is_file():
        return build_adapter(source, LAYOUT.name, evidence, modules, {})
    store = JoinedStore(source.store, open_store(head), _HEAD)
    saved = {name: name for name in store.shapes if name not in source.store.shapes}
    if saved.keys() != {_HEAD + key for key in _HEAD_KEYS}:
        raise ThetaError(f"{head} has {', '.join(sorted(saved))}; expected {', '.join(sorted(_HEAD_KEYS))}")
    return build_adapter(source, LAYOUT.name, evidence, modules, saved, store, task_type="SEQ_CLS")


LAYOUT = Layout("red", claims, read)


def _sort_keys(source: AdapterSource) -> dict[str, dict[str, str]]:
    """Module -> part of θ -> key. Raises as `read` does."""
    parts: dict[str, dict[str, str]] = {}
    for name, key in source.keys.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise ThetaError(
                f"{source.weights}: {key} is not one of RED's; expected <module>.delta_vector.activation_*"
            )
        if match["part"].startswith("ln"):
            raise LayoutError(
                f"{source.path}: {match['module']} has a LayerNorm of its own after it (layer_type 'ln'), which no "
                "weight can follow, so it cannot be merged; serve it with the authors' code"
            )
        parts.setdefault(match["module"], {})[match["part"]] = key
    wanted = {part for keys in parts.values() for part in keys}
    for module, keys in parts.items():
        if missing := sorted(wanted - set(keys)):
            raise ThetaError(
                f"{source.path}: {module}: activation_{missing[0]} is missing; the adapter is incomplete"
            )
    return parts
