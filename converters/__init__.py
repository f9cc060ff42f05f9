"""Offline conversion of trained PEANuT adapters. The public names; each is imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

from converters._version import __version__

if TYPE_CHECKING:
    from converters.adapters.adapter import Adapter, Weighted
    from converters.adapters.layouts.native import save_adapter
    from converters.adapters.loading import load_adapter
    from converters.adapters.opening import open_adapters
    from converters.api.exporting import export_onnx
    from converters.api.merging import merge, merge_each, prepare_merge
    from converters.errors import PeanutError
    from converters.inspection.norms import record_base
    from converters.methods.deltas import delta_weight, factors
    from converters.methods.factors import Factors
    from converters.methods.peanut.theta import Orientation
    from converters.methods.peanut.tweaker import Tweaker
    from converters.models.checkpoint import Checkpoint, open_checkpoint
    from converters.outputs.checkpoint.write import MergeResult, run_merge
    from converters.outputs.onnx.options import ExportOptions, Form
    from converters.plans.merge import Plan

_HOME = {
    "Adapter": "adapters.adapter",
    "Checkpoint": "models.checkpoint",
    "ExportOptions": "outputs.onnx.options",
    "Factors": "methods.factors",
    "Form": "outputs.onnx.options",
    "MergeResult": "outputs.checkpoint.write",
    "Orientation": "methods.peanut.theta",
    "PeanutError": "errors",
    "Plan": "plans.merge",
    "Tweaker": "methods.peanut.tweaker",
    "Weighted": "adapters.adapter",
    "delta_weight": "methods.deltas",
    "export_onnx": "api.exporting",
    "factors": "methods.deltas",
    "load_adapter": "adapters.loading",
    "merge": "api.merging",
    "merge_each": "api.merging",
    "open_checkpoint": "models.checkpoint",
    "open_adapters": "adapters.opening",
    "prepare_merge": "api.merging",
    "record_base": "inspection.norms",
    "run_merge": "outputs.checkpoint.write",
    "save_adapter": "adapters.layouts.native",
}

__all__ = [
    "Adapter",
    "Checkpoint",
    "ExportOptions",
    "Factors",
    "Form",
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
