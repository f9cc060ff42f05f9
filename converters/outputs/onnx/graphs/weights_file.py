"""External data of ONNX graphs: tensors one after the other in a file beside the graphs."""

from pathlib import Path
from types import TracebackType

import torch
from onnx import TensorProto
from torch import Tensor

# ONNX Runtime can map a tensor without a copy if it begins on a page; for small ones the padding would be waste
_PAGE, _SMALL_ALIGNMENT = 4096, 64
_SMALL_BYTES = 64 << 10

# what indices in θ may be (`INDEX_DTYPES` in `converters/methods/stored.py`)
_INDICES = {
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int16: TensorProto.INT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}


class WeightsFile:
    """A new file of tensors, float32.

    Args:
        file: must be in the same folder as the graphs that refer to it (ONNX Runtime follows no other path).
    """

    def __init__(self, file: Path) -> None:
        self._name = file.name
        self._file = file.open("xb")

    def __enter__(self) -> "WeightsFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, name: str, tensor: Tensor) -> TensorProto:
        """Write a tensor; returns the initializer that refers to it."""
        data = raw_bytes(tensor)
        alignment = _PAGE if len(data) >= _SMALL_BYTES else _SMALL_ALIGNMENT
        self._file.write(bytes(-self._file.tell() % alignment))
        proto = TensorProto(name=name, dims=tensor.shape, data_type=TensorProto.FLOAT)
        proto.data_location = TensorProto.EXTERNAL
        place = {"location": self._name, "offset": self._file.tell(), "length": len(data)}
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self._file.write(data)
        return proto


def raw_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor, as ONNX stores them."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def inline(name: str, tensor: Tensor) -> TensorProto:
    """An initializer that holds its numbers itself: float32, or indices of any integer type."""
    kind = TensorProto.FLOAT if tensor.is_floating_point() else _INDICES[tensor.dtype]
    return TensorProto(name=name, dims=tensor.shape, data_type=kind, raw_data=raw_bytes(tensor).tobytes())
