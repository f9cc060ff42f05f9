"""Offline conversion of trained PEANuT adapters. The public names; each is imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING

from converters._version import __version__

if TYPE_CHECKING:
    from converters.adapter import Adapter, Weighted
    from converters.adapter_specs import open_adapters
    from converters.checkpoint import Checkpoint, open_checkpoint
    from converters.errors import PeanutError
    from converters.evaluation import Factors, delta_weight, factors
    from converters.executor import MergeResult, run_merge
    from converters.exporting import export_onnx
    from converters.inspection import record_base
    from converters.layouts import load_adapter
    from converters.layouts.native import save_adapter
    from converters.merging import merge, merge_each, prepare_merge
    from converters.plan import Plan
    from converters.tweaker import Orientation, Tweaker

_HOME = {
    "Adapter": "adapter",
    "Checkpoint": "checkpoint",
    "Factors": "evaluation",
    "MergeResult": "executor",
    "Orientation": "tweaker",
    "PeanutError": "errors",
    "Plan": "plan",
    "Tweaker": "tweaker",
    "Weighted": "adapter",
    "delta_weight": "evaluation",
    "export_onnx": "exporting",
    "factors": "evaluation",
    "load_adapter": "layouts",
    "merge": "merging",
    "merge_each": "merging",
    "open_checkpoint": "checkpoint",
    "open_adapters": "adapter_specs",
    "prepare_merge": "merging",
    "record_base": "inspection",
    "run_merge": "executor",
    "save_adapter": "layouts.native",
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
    "Weighted",
    "__version__",
    "delta_weight",
    "export_onnx",
    "factors",
    "load_adapter",
    "merge",
    "merge_each",
    "open_adapters",
    "open_checkpoint",
    "prepare_merge",
    "record_base",
    "run_merge",
    "save_adapter",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'converters' has no attribute '{name}'")
    return getattr(import_module(f"converters.{_HOME[name]}"), name)
