"""Weights in host memory that the engine's workers map: one anonymous file per variant, sealed once it is written.

A `memfd` is not in a file system: nothing has to be cleaned up after a crash, and the small /dev/shm of containers
does not limit it. Once sealed, it can neither change nor shrink while it is mapped (`memfd_create(2)`). Workers are
other processes of the same user on the same machine; they open it by the path in `TensorInfo.file`.
"""

import fcntl
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import xxhash
from torch import Tensor, uint8

from converters.serving import TensorInfo, TensorSpec
from peanut_serve.errors import TryLaterError
from peanut_serve.variants.on_device.places import Factored, Place, UpdatedTensor

_ALIGNMENT = 64
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class HostMemoryError(TryLaterError):
    """The weights do not fit in host memory now."""


class HostWeights:
    """Tensors of one variant, or of the base.

    Args:
        name: identifies it in /proc.
        specs: the tensors that it consists of.
        factored: those that are written as their exact factors, by name.

    Attributes:
        tensors: what is written: tensors, and factors by names of their own.
        places: where workers get each tensor of `specs`.
        digests: of each tensor of `specs`, or of its factors.

    Raises `HostMemoryError` if host memory is not sufficient.
    """

    def __init__(
        self, name: str, specs: Iterable[TensorSpec], factored: Mapping[str, Factored] = MappingProxyType({})
    ) -> None:
        wanted, self._factored = list(specs), factored
        specs = stored(wanted, factored)
        places, end = _places(specs)
        self.nbytes = end
        _check_memory(name, end)
        self._descriptor = os.memfd_create(f"peanut-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        file = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")
        self.tensors: Mapping[str, TensorInfo] = {
            spec.name: TensorInfo(spec.name, spec.dtype, spec.shape, file, *places[spec.name]) for spec in specs
        }
        self.places: Mapping[str, Place] = {spec.name: self._place(spec.name) for spec in wanted}
        self.digests: dict[str, str] = {}
        self._lock = threading.Lock()
        self._open = {name: (0, xxhash.xxh3_128()) for name in self.tensors}
        try:
            os.posix_fallocate(self._descriptor, 0, max(end, 1))
        except OSError as error:
            self.close()
            raise HostMemoryError(
                f"cannot allocate {end >> 20} MiB of host memory for {name} ({error.strerror}); "
                "free some, or lower --host-cache"
            ) from None

    def put(self, name: str, piece: Tensor) -> None:
        """Write the next piece of a tensor. Several threads may write at once, each to different tensors."""
        info, (done, digest) = self.tensors[name], self._open[name]
        data = piece.contiguous().reshape(-1).view(uint8).numpy().data
        if done + len(data) > info.nbytes:
            raise ValueError(f"{name}: got more than the expected {info.nbytes} bytes")
        digest.update(data)
        written = 0
        while written < len(data):
            written += os.pwrite(self._descriptor, data[written:], info.offset + done + written)
        self._open[name] = (done + written, digest)

    def seal(self) -> "HostWeights":
        """Make the weights immutable, after everything was written.

        Raises `ValueError` if a tensor is incomplete.
        """
        for name, (done, _) in self._open.items():
            if done != self.tensors[name].nbytes:
                raise ValueError(f"{name}: got {done} bytes, expected {self.tensors[name].nbytes}")
        written = {name: digest.hexdigest() for name, (_, digest) in self._open.items()}
        for name in self.places:
            factors = self._factored.get(name)
            names = [name] if factors is None else [factors.up.name, factors.down.name]
            self.digests[name] = "-".join(written[one] for one in names)
        self._open.clear()
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return self

    def _place(self, name: str) -> Place:
        if (factors := self._factored.get(name)) is None:
            return self.tensors[name]
        return UpdatedTensor(factors.base, self.tensors[factors.up.name], self.tensors[factors.down.name])

    def close(self) -> None:
        """Close the file; its memory is freed as soon as no worker maps it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def stored(specs: Iterable[TensorSpec], factored: Mapping[str, Factored]) -> list[TensorSpec]:
    """What is written for these tensors: first the factors, side by side, so that one copy takes them to a device."""
    specs = list(specs)
    found = [factored[spec.name] for spec in specs if spec.name in factored]
    factors = [factor for one in found for factor in (one.up, one.down)]
    return [*factors, *(spec for spec in specs if spec.name not in factored)]


def allocated(specs: Iterable[TensorSpec]) -> int:
    """Bytes of host memory that `HostWeights` of these tensors take."""
    return _places(specs)[1]


def _places(specs: Iterable[TensorSpec]) -> tuple[dict[str, tuple[int, int]], int]:
    """Name -> (offset, size), and the size of all."""
    places, end = {}, 0
    for spec in specs:
        places[spec.name], end = (end, spec.nbytes), -(-(end + spec.nbytes) // _ALIGNMENT) * _ALIGNMENT
    return places, end


def available_memory() -> int:
    """Bytes that can be allocated without swapping, in this container."""
    lines = (line.split() for line in _MEMINFO.read_text().splitlines())
    free = next(int(words[1]) << 10 for words in lines if words[0] == "MemAvailable:")
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, KeyError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def _check_memory(name: str, nbytes: int) -> None:
    if nbytes > (free := available_memory()):
        raise HostMemoryError(
            f"{name} takes {nbytes >> 20} MiB of host memory, but only {free >> 20} MiB are free; "
            "free some, or lower --host-cache"
        )
