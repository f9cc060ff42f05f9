"""ONNX Runtime, or an error that says how to install it."""

from converters.errors import MissingDependencyError

try:
    import onnxruntime
except ImportError:
    raise MissingDependencyError("ONNX Runtime is not installed: pip install 'peanut-serve[onnx]'") from None

__all__ = ["onnxruntime"]
