"""The server's host memory in a worker: files that are mapped, and those whose factors were copied to the device."""

import logging
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.serving import TensorInfo, TensorReader
from peanut_serve.variants.on_device.places import Place, UpdatedTensor

logger = logging.getLogger("vllm.peanut_serve")

_READ_ONLY_REGISTERED = 8  # cudaHostRegisterReadOnly


class Maps:
    """Files in host memory that this worker has mapped. Keeping them mapped saves the next swap page faults."""

    def __init__(self) -> None:
        self._maps: dict[tuple[str, int], Tensor] = {}  # by path and inode: paths in /proc are reused

    def refresh(self) -> None:
        """Unmap files that the server has closed, so that their memory is freed."""
        for path, inode in [key for key in self._maps if _inode(key[0]) != key[1]]:
            _unpin(self._maps.pop((path, inode)))

    def whole(self, file: Path) -> Tensor:
        """All bytes of a file."""
        with file.open("rb") as opened:
            key = (str(file), os.fstat(opened.fileno()).st_ino)
            if key not in self._maps:
                self._maps[key] = _map(opened.fileno())
        return self._maps[key]


def _map(descriptor: int) -> Tensor:
    """Map the bytes of a file, page-locked if there is a GPU, which can then copy from them directly."""
    mapped = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the tensor being read-only, which is intended
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
    if torch.cuda.is_available():
        code = _cuda_runtime().cudaHostRegister(whole.data_ptr(), whole.nbytes, _READ_ONLY_REGISTERED)
        if int(code) != 0:
            logger.warning("cannot pin %d MiB of host memory (%s); swaps copy more slowly", whole.nbytes >> 20, code)
    return whole


def _unpin(whole: Tensor) -> None:
    """Undo the page lock of a file, before it is unmapped."""
    if torch.cuda.is_available():
        _cuda_runtime().cudaHostUnregister(whole.data_ptr())  # harmless error if it was not pinned


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino  # noqa: PTH116
    except OSError:
        return None


_maps = Maps()


def in_host_memory(infos: Iterable[TensorInfo]) -> set[Path]:
    """The files of tensors that are in the server's memory."""
    return {info.file for info in infos if info.file.is_relative_to("/proc")}


@contextmanager
def source(places: Sequence[Place]) -> Iterator[Callable[[Place], Tensor]]:
    """Yield a function that reads a tensor in a file, without a copy if that is in the server's memory."""
    infos = [place for place in places if isinstance(place, TensorInfo)]
    _maps.refresh()
    mapped = {file: _maps.whole(file) for file in in_host_memory(infos)}
    with TensorReader() as reader:

        def read(info: Place) -> Tensor:
            if not isinstance(info, TensorInfo):
                raise ValueError(f"{info.name} is not in a file")
            if info.file not in mapped:
                return reader.whole(info)
            return _view(mapped[info.file], info, 0)

        yield read


def _view(data: Tensor, info: TensorInfo, start: int) -> Tensor:
    """A tensor in bytes that begin at byte `start` of its file."""
    offset = info.offset - start
    return data[offset : offset + info.nbytes].view(info.torch_dtype).reshape(info.shape)


class StagedFactors:
    """The factors of one variant in the memory of a device, copied at once: they lie side by side in their file.

    Args:
        device: of the worker.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._data: Tensor | None = None
        self._key: tuple[str, int | None, int, int] | None = None

    def stage(self, places: Sequence[Place]) -> None:
        """Map what a swap will read, and copy its factors to the device; those staged before are dropped."""
        updated = [place for place in places if isinstance(place, UpdatedTensor)]
        plain = [place for place in places if isinstance(place, TensorInfo)]
        _maps.refresh()
        for file in in_host_memory([*plain, *(place.up for place in updated)]):
            _maps.whole(file)
        if updated:
            self._load(updated)

    @contextmanager
    def factors(self, places: Sequence[Place]) -> Iterator[Callable[[TensorInfo], Tensor]]:
        """Yield a function that reads a factor, on the device. Those of these tensors are copied unless they were."""
        updated = [place for place in places if isinstance(place, UpdatedTensor)]
        if updated:
            self._load(updated)

        def read(info: TensorInfo) -> Tensor:
            if self._data is None or self._key is None:
                raise ValueError(f"{info.name} is not on {self._device}")
            return _view(self._data, info, self._key[2])

        try:
            yield read
        finally:
            self._data = self._key = None

    def _load(self, updated: Sequence[UpdatedTensor]) -> None:
        factors = [factor for place in updated for factor in (place.up, place.down)]
        files = {factor.file for factor in factors}
        if len(files) != 1:
            raise ValueError(f"the factors of a variant are in {len(files)} files, expected one")
        file = files.pop()
        start, end = min(one.offset for one in factors), max(one.offset + one.nbytes for one in factors)
        key = (str(file), _inode(str(file)), start, end)
        if self._key != key:
            self._data = None  # its memory is free for what follows
            # where the device's memory is the host's, this is a view
            self._data = _maps.whole(file)[start:end].to(self._device)
            self._key = key
