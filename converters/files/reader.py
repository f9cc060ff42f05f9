"""Reading tensors of safetensors files in blocks, so that no tensor has to fit in memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
import xxhash
from torch import Tensor

from converters.errors import CheckpointError
from converters.files.header import TensorInfo

CHUNK_BYTES = 1 << 20  # stays in a CPU's cache between reading and hashing
_AHEAD_BYTES = 64 << 20


class TensorReader:
    """Reads byte ranges and row blocks of tensors. Opens each file once. Not thread-safe.

    The methods yield views of one reused buffer, which are valid until the next read. Files are read with `preadv`
    instead of being mapped, so that truncation during a read raises an error, not SIGBUS.

    Args:
        pinned: read into page-locked memory, from which a GPU can copy directly.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._files: dict[Path, int] = {}
        self._pinned = pinned
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def descriptor(self, file: Path) -> int:
        """The descriptor of the open file. Raises `CheckpointError` if it cannot be opened."""
        if file not in self._files:
            try:
                self._files[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be opened ({error})") from None
        return self._files[file]

    def prefetch(self, info: TensorInfo) -> None:
        """Read the beginning of a tensor ahead; the kernel's own read-ahead covers the sequential rest."""
        if hasattr(os, "posix_fadvise"):
            size = min(info.nbytes, _AHEAD_BYTES)
            os.posix_fadvise(self.descriptor(info.file), info.offset, size, os.POSIX_FADV_WILLNEED)

    def _read(self, info: TensorInfo, start: int, size: int) -> Tensor:
        """Bytes `start : start + size` of a tensor as uint8 (size,)."""
        if self._buffer.numel() < size:
            self._buffer = torch.empty(max(size, CHUNK_BYTES), dtype=torch.uint8, pin_memory=self._pinned)
        into = self._buffer[:size]
        view = into.numpy().data
        descriptor = self.descriptor(info.file)
        done = 0
        while done < size:
            try:
                got = os.preadv(descriptor, [view[done:]], info.offset + start + done)
            except OSError as error:
                raise CheckpointError(f"{info.file}: cannot read {info.name} ({error}); check the disk") from None
            if got == 0:
                raise CheckpointError(
                    f"{info.file}: ended in the middle of {info.name}; the file was truncated while it was read"
                )
            done += got
        return into

    def chunks(self, info: TensorInfo) -> Iterator[Tensor]:
        """The bytes of a tensor in chunks, each uint8 (n,)."""
        for start in range(0, info.nbytes, CHUNK_BYTES):
            yield self._read(info, start, min(CHUNK_BYTES, info.nbytes - start))

    def hash(self, info: TensorInfo) -> str:
        """xxh3_128 of a tensor's bytes."""
        digest = xxhash.xxh3_128()
        for chunk in self.chunks(info):
            digest.update(chunk.numpy().data)
        return digest.hexdigest()

    def range(self, info: TensorInfo, start: int, size: int) -> bytes:
        """A copy of bytes `start : start + size` of a tensor."""
        return self._read(info, start, size).numpy().tobytes()

    def row_blocks(self, info: TensorInfo, rows: int) -> Iterator[Tensor]:
        """A floating-point tensor in blocks of `rows` along dimension 0, each (n, ...)."""
        if not info.shape:
            yield self._read(info, 0, info.nbytes).view(info.torch_dtype).reshape(())
            return
        for start in range(0, info.shape[0], rows):
            yield self._rows(info, start, min(rows, info.shape[0] - start))

    def whole(self, info: TensorInfo) -> Tensor:
        """A copy of a whole floating-point tensor."""
        return self._read(info, 0, info.nbytes).clone().view(info.torch_dtype).reshape(info.shape)

    def row(self, info: TensorInfo, index: int) -> Tensor:
        """One row of a floating-point tensor."""
        return self._rows(info, index, 1)[0]

    def _rows(self, info: TensorInfo, start: int, count: int) -> Tensor:
        row_bytes = info.row_size * info.torch_dtype.itemsize
        data = self._read(info, start * row_bytes, count * row_bytes)
        return data.view(info.torch_dtype).reshape(count, *info.shape[1:])
