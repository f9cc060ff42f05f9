"""Files in ONNX Runtime's adapter format (`onnxruntime.AdapterFormat`): the low-rank factors and head of one task."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from converters.inference.runtime import onnxruntime


def model_version(fingerprint: str) -> int:
    """The model version stored in an adapter file: 28 bits derived from the fingerprint of the base.

    ONNX Runtime stores this number but never checks it; the ONNX engine of `peanut_serve` does.
    """
    return int(hashlib.sha256(fingerprint.encode()).hexdigest()[:7], 16)


def write_adapter_file(file: Path, parameters: Mapping[str, Tensor], fingerprint: str) -> None:
    """Write float32 values of overridable initializers, by name, for a graph of the base with this fingerprint."""
    content = onnxruntime.AdapterFormat()
    content.set_adapter_version(1)
    content.set_model_version(model_version(fingerprint))
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in parameters.items()}
    content.set_parameters(values)
    content.export_adapter(str(file.resolve()))


def read_adapter_file(file: Path) -> tuple[int, frozenset[str]]:
    """The model version of an adapter file, see `model_version`, and the names of its parameters."""
    content = onnxruntime.AdapterFormat.read_adapter(str(file.resolve()))
    return int(content.get_model_version()), frozenset(content.get_parameters())
