"""Reading and writing safetensors files row by row, so that no tensor has to fit in memory.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length, a JSON header, the data.
Validation is the safetensors library's; what it cannot do is hand out or take in a part of a tensor.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from converters.errors import CheckpointError

COPY_BYTES = 8 << 20

FLOAT_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its bytes are `file[offset : offset + nbytes]`, C-contiguous."""

    name: str
    dtype: str  # as safetensors spells it: F32, BF16, I64, ...
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of a floating tensor; `KeyError` for any other."""
        return FLOAT_DTYPES[self.dtype]

    @property
    def row_size(self) -> int:
        """Numbers in one row, i.e. at one index of dimension 0."""
        return math.prod(self.shape[1:])

    @property
    def is_float(self) -> bool:
        """Whether this is an ordinary floating tensor, which a cast may touch."""
        return self.dtype in FLOAT_DTYPES


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file in file order, and its metadata.

    Raises:
        CheckpointError: the file is not safetensors, truncated, or its header lies about its data.
    """
    try:
        with safe_open(path, framework="np") as checked:  # checks lengths, overlaps and holes
            metadata = dict(checked.metadata() or {})
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); it may be truncated, fetch it again"
        ) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = [
        TensorInfo(
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            path,
            8 + length + begin,
            entry["data_offsets"][1] - begin,
        )
        for name, entry in header.items()
        for begin in [entry["data_offsets"][0]]
    ]
    return sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)), metadata


class TensorReader:
    """Reads byte ranges and row blocks of tensors, keeping each file open once.

    What a method yields is a view of one reused buffer: it is valid until the next read.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._buffer = torch.empty(COPY_BYTES, dtype=torch.uint8)

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _read(self, info: TensorInfo, start: int, size: int) -> Tensor:
        """Bytes `start : start + size` of a tensor as uint8 (size,)."""
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        if info.file not in self._files:
            try:
                self._files[info.file] = os.open(info.file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{info.file}: cannot be opened ({error})") from None
        into = self._buffer[:size]
        view = into.numpy().data
        done = 0
        while done < size:
            try:
                got = os.preadv(self._files[info.file], [view[done:]], info.offset + start + done)
            except OSError as error:
                raise CheckpointError(f"{info.file}: cannot read {info.name} ({error})") from None
            if got == 0:
                raise CheckpointError(
                    f"{info.file}: ended in the middle of {info.name}; it was truncated while it was read"
                )
            done += got
        return into

    def chunks(self, info: TensorInfo) -> Iterator[Tensor]:
        """The bytes of a tensor in pieces, each uint8 (n,)."""
        for start in range(0, info.nbytes, COPY_BYTES):
            yield self._read(info, start, min(COPY_BYTES, info.nbytes - start))

    def range(self, info: TensorInfo, start: int, size: int) -> bytes:
        """A copy of bytes `start : start + size` of a tensor."""
        return self._read(info, start, size).numpy().tobytes()

    def row_blocks(self, info: TensorInfo, rows: int) -> Iterator[Tensor]:
        """A floating tensor in blocks of `rows` along dimension 0, each (n, ...)."""
        if not info.shape:
            yield self._read(info, 0, info.nbytes).view(info.torch_dtype).reshape(())
            return
        for start in range(0, info.shape[0], rows):
            yield self._rows(info, start, min(rows, info.shape[0] - start))

    def row(self, info: TensorInfo, index: int) -> Tensor:
        """One row of a floating tensor."""
        return self._rows(info, index, 1)[0]

    def _rows(self, info: TensorInfo, start: int, count: int) -> Tensor:
        row_bytes = info.row_size * info.torch_dtype.itemsize
        data = self._read(info, start * row_bytes, count * row_bytes)
        return data.view(info.torch_dtype).reshape(count, *info.shape[1:])


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class TensorWriter:
    """Writes one safetensors file front to back: the header first, then each tensor in pieces.

    Tensors must come in the order of `specs`. `finish` syncs the file to the disk; without it the file is
    incomplete, and the length check of every reader refuses it.
    """

    def __init__(self, path: Path, specs: list[TensorSpec], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for spec in specs:
            begin, end = end, end + spec.nbytes
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._path = path
        self._pending = list(reversed(specs))
        self._left = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._put(memoryview(len(text).to_bytes(8, "little") + text))

    def _put(self, data: memoryview) -> None:
        while data:
            data = data[os.write(self._file, data) :]

    def begin(self, name: str) -> None:
        """Start the next tensor, which must be `name`."""
        spec = self._pending.pop()
        if self._left or spec.name != name:
            raise ValueError(f"{self._path}: {name} was begun where {spec.name} is due")
        self._left, self._hash = spec.nbytes, xxhash.xxh3_128()

    def write(self, data: Tensor) -> None:
        """Append a contiguous piece of the tensor that was begun."""
        view = data.reshape(-1).view(torch.uint8).numpy().data
        self._left -= len(view)
        self._hash.update(view)
        self._put(view)

    def end(self) -> str:
        """Close the tensor that was begun; returns the xxh3_128 of its bytes."""
        if self._left:
            raise ValueError(f"{self._path}: {self._left} bytes missing in the tensor being written")
        return self._hash.hexdigest()

    def finish(self) -> None:
        """Sync the file to the disk."""
        if self._pending or self._left:
            raise ValueError(f"{self._path}: finished with {len(self._pending)} tensors missing")
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file, finished or not."""
        os.close(self._file)
