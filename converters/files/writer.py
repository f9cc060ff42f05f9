"""Writing one safetensors file, with tensors in any order and from several threads."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from converters.files.copying import drop_written, start_writeback, write_at
from converters.files.header import TensorSpec, build_header


class ShardWriter:
    """A safetensors file of known layout that is filled incrementally.

    `finish` writes the header last; until then no reader accepts the file as a checkpoint.

    Args:
        path: the file; existing content is kept, so that an interrupted run can be resumed.
        specs: the tensors in file order.
        metadata: written to the header.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        self._header, self.places = build_header(specs, metadata, path)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        os.ftruncate(self._file, len(self._header) + sum(spec.nbytes for spec in specs))

    def write(self, name: str, start: int, data: Tensor) -> None:
        """Write a contiguous tensor to bytes `start : start + data.nbytes` of a tensor."""
        place = self.places[name]
        if start + data.nbytes > place.nbytes:
            raise ValueError(f"{place.file}: {name} has {place.nbytes} bytes, not {start + data.nbytes}")
        write_at(self._file, data.reshape(-1).view(torch.uint8).numpy().data, place.offset + start)

    def start_writeback(self, name: str) -> None:
        """Start writing a tensor to disk in the background."""
        start_writeback(self._file, self.places[name].offset, self.places[name].nbytes)

    def drop(self, name: str) -> None:
        """Wait until a tensor is on disk, then drop it from the page cache."""
        drop_written(self._file, self.places[name].offset, self.places[name].nbytes)

    def finish(self) -> None:
        """Write the header and sync the file to disk."""
        write_at(self._file, memoryview(self._header), 0)
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file, whether or not it is finished."""
        os.close(self._file)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one go, with the rights of every other file: safetensors gives it 0600."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata is not None else None)
    path.chmod(mode)
