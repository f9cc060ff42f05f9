"""Headers of safetensors files: the location of each tensor, and the header of a new file.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length, a JSON header, the data.
The safetensors library does the validation. It cannot read or write part of a tensor; `reader.py` and `writer.py`
do that.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from converters.errors import CheckpointError

FLOAT_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

INTEGER_DTYPES: dict[torch.dtype, str] = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_TORCH_DTYPES = FLOAT_DTYPES | {name: dtype for dtype, name in INTEGER_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """The location of one tensor: its bytes are `file[offset : offset + nbytes]`, C-contiguous."""

    name: str
    dtype: str  # in safetensors' spelling: F32, BF16, I64, ...
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of floating-point or whole numbers. Raises `KeyError` for any other."""
        return _TORCH_DTYPES[self.dtype]

    @property
    def row_size(self) -> int:
        """Number of elements in one row, i.e. at one index of dimension 0."""
        return math.prod(self.shape[1:])

    def as_matrix(self, shape: tuple[int, int]) -> "TensorInfo":
        """The same bytes as a matrix of this shape."""
        return replace(self, shape=shape)

    @property
    def is_float(self) -> bool:
        """Whether this is an ordinary floating-point tensor, which may be cast."""
        return self.dtype in FLOAT_DTYPES


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file in file order, and its metadata.

    Raises:
        CheckpointError: the file may not be read, is not safetensors or is truncated, or its header does not match
            its data.
    """
    try:
        path.open("rb").close()  # safetensors does not tell a file that may not be read from a damaged one
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
    try:
        with safe_open(path, framework="np") as checked:  # checks lengths, overlaps and holes
            metadata = dict(checked.metadata() or {})
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); it may be truncated; fetch it again"
        ) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return list_tensors(header, path, 8 + length), metadata


def list_tensors(header: Mapping[str, Any], file: Path, data_start: int) -> list[TensorInfo]:
    """The entries of a header in file order. The tensor data start at `data_start`."""
    tensors = [
        TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, data_start + begin, end - begin)
        for name, entry in header.items()
        if name != "__metadata__"
        for begin, end in [entry["data_offsets"]]
    ]
    return sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))


def build_header(
    specs: Iterable[TensorSpec], metadata: Mapping[str, str], path: Path
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The length and header of a file with `specs` in this order, and the location of each tensor in it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    places = {info.name: info for info in list_tensors(header, path, 8 + len(text))}
    return len(text).to_bytes(8, "little") + text, places
