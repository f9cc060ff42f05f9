"""Offline conversion of trained PEANuT adapters. The public names; each is imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING

from converters._version import __version__

if TYPE_CHECKING:
    from converters.adapter import Adapter
    from converters.checkpoint import Checkpoint, open_checkpoint
    from converters.errors import PeanutError
    from converters.executor import MergeResult, merge, prepare_merge, run_merge
    from converters.inspection import record_base
    from converters.layouts import load_adapter
    from converters.plan import Plan
    from converters.tweaker import Factors, Orientation, Tweaker, delta_weight, factors

_HOME = {
    "Adapter": "adapter",
    "Checkpoint": "checkpoint",
    "Factors": "tweaker",
    "MergeResult": "executor",
    "Orientation": "tweaker",
    "PeanutError": "errors",
    "Plan": "plan",
    "Tweaker": "tweaker",
    "delta_weight": "tweaker",
    "factors": "tweaker",
    "load_adapter": "layouts",
    "merge": "executor",
    "open_checkpoint": "checkpoint",
    "prepare_merge": "executor",
    "record_base": "inspection",
    "run_merge": "executor",
}

__all__ = [
    "Adapter",
    "Checkpoint",
    "Factors",
    "MergeResult",
    "Orientation",
    "PeanutError",
    "Plan",
    "Tweaker",
    "__version__",
    "delta_weight",
    "factors",
    "load_adapter",
    "merge",
    "open_checkpoint",
    "prepare_merge",
    "record_base",
    "run_merge",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'converters' has no attribute '{name}'")
    return getattr(import_module(f"converters.{_HOME[name]}"), name)
