"""W0 in the memory of the engine's devices, to evaluate variants there and to restore the base's weights."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from converters import Checkpoint
from converters.serving import TensorInfo
from peanut_serve.errors import VariantError
from peanut_serve.variants.on_device.places import KeptTensor


@dataclass(frozen=True)
class Room:
    """The memory of one worker's device, in bytes.

    Attributes:
        device: its name.
        needed: for the tensors that it does not keep yet, and to evaluate one.
        free: what can be allocated now.
    """

    device: str
    needed: int
    free: int

    @property
    def shortage(self) -> str | None:
        """Why the tensors cannot be kept, and what to do; None if they fit."""
        if self.needed <= self.free:
            return None
        return (
            f"--base-copy device needs {self.needed >> 20} MiB more on {self.device} for W0 of what variants change, "
            f"but {self.free >> 20} MiB are free; lower --gpu-memory-utilization, by which vLLM takes the rest, or "
            "use --base-copy host"
        )


class Keeper(Protocol):
    """The engine's operations that copies of W0 need."""

    async def room(self, places: Sequence[TensorInfo]) -> list[Room]:
        """The memory of each worker's device, if it kept these tensors too."""

    async def keep(self, places: Sequence[TensorInfo]) -> int:
        """Keep tensors of the base, from its files, on the devices; returns the size of all that are kept."""


class DeviceCopies:
    """W0 on the devices. What is not kept there is restored from `BaseWeights`.

    Args:
        base: the checkpoint.
        keeper: the engine.

    Attributes:
        kept: name -> a tensor that the workers keep.
        nbytes: size of the copies, of all workers.
    """

    def __init__(self, base: Checkpoint, keeper: Keeper) -> None:
        self._base, self._keeper = base, keeper
        self._copying = asyncio.Lock()
        self.nbytes = 0
        self.kept: dict[str, KeptTensor] = {}

    async def prepare(self, names: Iterable[str]) -> None:
        """Make sure that the workers keep tensors, with the engine at work.

        Raises `CheckpointError` if the base's files have changed, `VariantError` if the devices have not enough
        memory, and the engine's errors.
        """
        if missing := self._missing(names):
            await asyncio.shield(self._copy(missing))  # a caller that is cancelled leaves complete copies

    async def shortage(self, names: Iterable[str]) -> str | None:
        """Why these tensors would not fit on the devices; None if they would."""
        rooms = await self._keeper.room([self._base.tensors[name] for name in self._missing(names)])
        return next((room.shortage for room in rooms if room.shortage is not None), None)

    def _missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in self.kept]

    async def _copy(self, names: list[str]) -> None:
        async with self._copying:
            if not (missing := self._missing(names)):  # without those copied while waiting for the lock
                return
            infos = [self._base.tensors[name] for name in missing]
            if (shortage := await self.shortage(missing)) is not None:
                raise VariantError(shortage)
            self._base.check_unchanged()
            self.nbytes = await self._keeper.keep(infos)
            self._base.check_unchanged()
            self.kept |= {info.name: KeptTensor(info) for info in infos}
