"""Evaluated weights of recent variants in host memory, bounded: a repeated swap costs a copy, and no evaluation."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from converters import Checkpoint
from converters.serving import TensorInfo, TensorReader, TensorSpec
from peanut_serve.variants.host_weights import HostMemoryError, HostWeights
from peanut_serve.variants.version import Version


class HostCache:
    """Weights by digest. For one event loop; evaluation runs in threads, one at a time.

    What is held or pinned stays; of the rest, the least recently used goes when there is no room.

    Args:
        limit: bytes.
        evaluate: how a version becomes weights.
    """

    def __init__(self, limit: int, evaluate: Callable[[Version], HostWeights] = Version.evaluate) -> None:
        self.limit = limit
        self._evaluate = evaluate
        self._weights: dict[str, HostWeights] = {}  # the least recently used first
        self._holds: Counter[str] = Counter()
        self._pins: set[str] = set()
        self._evaluating = asyncio.Lock()

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(weights.nbytes for weights in self._weights.values())

    def get(self, digest: str) -> HostWeights | None:
        """The weights, if they are there."""
        return self._weights.get(digest)

    async def load(self, version: Version) -> HostWeights:
        """The weights of a version, evaluated unless they are there. They may go as soon as nobody holds them.

        Raises `HostMemoryError` when they do not fit beside those that have to stay, and what evaluation raises.
        """
        if (weights := self._used(version.digest)) is not None:
            return weights  # whatever is being evaluated meanwhile
        # a thread cannot be stopped: if its caller goes away meanwhile, what it evaluates is kept all the same
        return await asyncio.shield(self._load(version))

    def _used(self, digest: str) -> HostWeights | None:
        weights = self._weights.pop(digest, None)
        if weights is not None:
            self._weights[digest] = weights  # the last that was used
        return weights

    async def _load(self, version: Version) -> HostWeights:
        async with self._evaluating:
            weights = self._used(version.digest)
            if weights is None:
                self._make_room(version)
                weights = self._weights[version.digest] = await asyncio.to_thread(self._evaluate, version)
            return weights

    @contextmanager
    def holding(self, digest: str) -> Iterator[None]:
        """The weights stay meanwhile, once they are there."""
        self._holds[digest] += 1
        try:
            yield
        finally:
            self._holds[digest] -= 1

    def pin(self, digest: str, pinned: bool) -> None:
        """Keep weights for good, or no longer."""
        if pinned:
            self._pins.add(digest)
        else:
            self._pins.discard(digest)

    def drop(self, digest: str) -> None:
        """Let weights go, unless they are held."""
        self._pins.discard(digest)
        if digest in self._weights and not self._stays(digest):
            self._weights.pop(digest).close()

    def close(self) -> None:
        """Let everything go."""
        for weights in self._weights.values():
            weights.close()
        self._weights.clear()

    def _stays(self, digest: str) -> bool:
        return digest in self._pins or self._holds[digest] > 0

    def _make_room(self, version: Version) -> None:
        staying = sum(weights.nbytes for digest, weights in self._weights.items() if self._stays(digest))
        if staying + version.nbytes > self.limit:
            raise HostMemoryError(
                f"the weights take {version.nbytes >> 20} MiB; --host-cache is {self.limit >> 20} MiB, of which "
                f"{staying >> 20} MiB are in use or pinned; give it more, or unpin a variant"
            )
        for digest in [digest for digest in self._weights if not self._stays(digest)]:
            if self.nbytes + version.nbytes <= self.limit:
                return
            self._weights.pop(digest).close()


class BaseWeights:
    """W0, to go back to: the base's files, or copies of those tensors that variants change.

    Args:
        base: the checkpoint.
        on_host: copy to host memory what is asked for, before it is needed.
    """

    def __init__(self, base: Checkpoint, on_host: bool) -> None:
        self._on_host = on_host
        self._base = base
        self._copies: list[HostWeights] = []
        self._copying = asyncio.Lock()
        self.tensors: dict[str, TensorInfo] = dict(base.tensors)

    @property
    def nbytes(self) -> int:
        """Of the copies."""
        return sum(copy.nbytes for copy in self._copies)

    async def prepare(self, names: Iterable[str]) -> None:
        """Make sure that tensors can be read.

        Raises `CheckpointError` when the base's files are not what they were, `HostMemoryError` without room.
        """
        if not self._on_host:
            self._base.check_unchanged()
        elif missing := self._missing(names):
            await asyncio.shield(self._copy(missing))  # as above

    def _missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.tensors[name] is self._base.tensors[name]]

    async def _copy(self, names: list[str]) -> None:
        async with self._copying:
            if missing := self._missing(names):  # others have copied meanwhile
                copy = await asyncio.to_thread(host_copy, self._base, missing)
                self._copies.append(copy)
                self.tensors |= copy.tensors


def host_copy(base: Checkpoint, names: Iterable[str]) -> HostWeights:
    """Tensors of the base in host memory, as they are on the disk."""
    infos = [base.tensors[name] for name in names]
    weights = HostWeights("base", [TensorSpec(i.name, i.dtype, i.shape, i.nbytes) for i in infos])
    try:
        base.check_unchanged()
        with TensorReader() as reader:
            for info in infos:
                for chunk in reader.chunks(info):
                    weights.put(info.name, chunk)
        base.check_unchanged()
        return weights.seal()
    except BaseException:
        weights.close()
        raise
