"""What each thread of a merge owns: a reader, reused buffers, and on a GPU a stream.

Every worker takes whole tensors and evaluates them on one thread, so that the output does not depend on how many
workers there are. While one waits for the disk, another computes; on a GPU there are two for each device, whose
streams overlap: one's blocks travel through page-locked buffers while the other's are evaluated.
"""

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from converters.errors import OptionError
from converters.evaluation.precision import EVALUATION_DTYPE
from converters.files.blocks import block_rows
from converters.files.header import TensorInfo
from converters.files.reader import TensorReader

_MOST_CPU_WORKERS = 8  # more only wait for memory and disk, and each holds buffers
_WORKERS_PER_GPU = 2


class WrittenRange(Protocol):
    """Something that was written to a file and is still in the page cache."""

    def drop(self) -> None:
        """Wait until it is on disk, and remove it from the page cache."""


class StoppedError(Exception):
    """Raised in a worker when another one failed, or the run was interrupted."""


class Worker:
    """One thread's tools.

    Args:
        device: where it evaluates.
        stop: once set, the next block raises `StoppedError`.
    """

    def __init__(self, device: torch.device, stop: threading.Event) -> None:
        self.device = device
        self._stop = stop
        self._on_gpu = device.type == "cuda"
        self.reader = TensorReader(pinned=self._on_gpu)
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._wide = torch.empty(0, dtype=EVALUATION_DTYPE, device=device)
        self._second = self._wide
        self._previous: Sequence[WrittenRange] = ()
        self._rounded = torch.empty(0, dtype=torch.uint8)

    def active(self) -> AbstractContextManager[object]:
        """The context that the thread has to work in."""
        torch.set_num_threads(1)
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def close(self) -> None:
        """Close its files."""
        self.reader.close()

    def defer_drop(self, written: Sequence[WrittenRange]) -> None:
        """Drop what the previous job wrote from the page cache; the disk has had one job's time to write it."""
        for output in self._previous:
            output.drop()
        self._previous = written

    def check_stopped(self) -> None:
        """Raise `StoppedError` if the run has to end."""
        if self._stop.is_set():
            raise StoppedError

    def wide_blocks(self, info: TensorInfo) -> Iterator[tuple[int, Tensor]]:
        """Row blocks of a matrix in float64 on the device, each with the number of its first row.

        A block is a reused buffer that may be modified; it is valid until the next one.
        """
        start, rows = 0, block_rows(info.row_size)
        if self._wide.numel() < rows * info.row_size:
            self._wide = torch.empty(rows * info.row_size, dtype=EVALUATION_DTYPE, device=self.device)
        for block in self.reader.row_blocks(info, rows):
            self.check_stopped()
            wide = self._wide[: block.numel()].view(block.shape)
            wide.copy_(block.to(self.device, non_blocking=True))
            self._synchronize()  # before the reader's buffer is filled again
            yield start, wide
            start += block.shape[0]

    def copy_of(self, wide: Tensor) -> Tensor:
        """A copy of a block in a second buffer."""
        if self._second.numel() < wide.numel():
            self._second = torch.empty_like(self._wide)
        return self._second[: wide.numel()].view(wide.shape).copy_(wide)

    def rounded(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """The values in `dtype` on the CPU, in a reused buffer."""
        size = numbers.numel() * dtype.itemsize
        if self._rounded.numel() < size:
            self._rounded = torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu)
        into = self._rounded[:size].view(dtype).view(numbers.shape)
        into.copy_(numbers.to(dtype) if self._on_gpu else numbers, non_blocking=True)
        self._synchronize()
        return into

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def find_devices(device: str) -> list[torch.device]:
    """The device of each worker: `auto` is every GPU, or the CPU; `cuda` is every GPU.

    Raises `OptionError` for a device that is not available.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise OptionError(f"device '{device}' is unknown; expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and count == 0):
        return [torch.device("cpu")] * max(1, min(torch.get_num_threads(), _MOST_CPU_WORKERS, os.cpu_count() or 1))
    index = torch.device(device).index if device != "auto" else None
    if (index or 0) >= count:
        raise OptionError(
            f"device '{device}' is not available: this PyTorch sees {count} CUDA devices; use device='cpu'"
        )
    gpus = [index] if index is not None else range(count)
    return [torch.device("cuda", gpu) for _ in range(_WORKERS_PER_GPU) for gpu in gpus]
