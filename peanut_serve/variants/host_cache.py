"""A bounded cache of evaluated weights in host memory: a repeated swap needs a copy, but no evaluation."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from converters import Checkpoint
from converters.serving import TensorInfo, TensorReader, TensorSpec
from peanut_serve.variants.evaluations import Evaluations
from peanut_serve.variants.host_weights import HostMemoryError, HostWeights
from peanut_serve.variants.version import Version


class HostCache:
    """Weights by digest. For one event loop; evaluation runs in threads.

    Held and pinned weights are kept. Of the others, the least recently used are dropped to make room.

    Args:
        limit: size limit, in bytes.
        evaluations: bounds the evaluations.
        evaluate: evaluates the weights of a version.
    """

    def __init__(
        self,
        limit: int,
        evaluations: Evaluations,
        evaluate: Callable[[Version], HostWeights] = Version.evaluate,
    ) -> None:
        self.limit = limit
        self._evaluations, self._evaluate = evaluations, evaluate
        self._weights: dict[str, HostWeights] = {}  # the least recently used first
        self._holds: Counter[str] = Counter()
        self._pins: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Size of all weights in the cache."""
        return sum(weights.nbytes for weights in self._weights.values())

    def get(self, digest: str) -> HostWeights | None:
        """The weights, if they are in the cache."""
        return self._weights.get(digest)

    async def load(self, version: Version, drops: bool = True) -> HostWeights:
        """The weights of a version, evaluated if they are not cached. Unless held, they may be dropped at any time.

        Args:
            version: whose weights.
            drops: drop others to make room.

        Raises `HostMemoryError` if they do not fit with the held and pinned weights, `QueueFullError`, and what
        evaluation raises.
        """
        if (weights := self._used(version.digest)) is not None:
            return weights  # without waiting for a running evaluation
        # a thread cannot be cancelled: if the caller is, the evaluated weights are kept anyway
        key = version.digest if drops else f"{version.digest}, without dropping others"  # which alone it may fail for
        return await self._evaluations.run(key, lambda: self._load(version, drops))

    def _used(self, digest: str) -> HostWeights | None:
        weights = self._weights.pop(digest, None)
        if weights is not None:
            self._weights[digest] = weights  # now the most recently used
        return weights

    async def _load(self, version: Version, drops: bool) -> HostWeights:
        weights = self._used(version.digest)
        if weights is None:
            self._make_room(version, drops)
            weights = self._weights[version.digest] = await asyncio.to_thread(self._evaluate, version)
        return weights

    @contextmanager
    def holding(self, digest: str) -> Iterator[None]:
        """Keep the weights in the cache while the context is open; they may be loaded after it was opened."""
        self._holds[digest] += 1
        try:
            yield
        finally:
            self._holds[digest] -= 1

    def pin(self, digest: str, pinned: bool) -> None:
        """Keep weights permanently, or no longer."""
        if pinned:
            self._pins.add(digest)
        else:
            self._pins.discard(digest)

    def evictable(self, digest: str) -> int:
        """Bytes that dropping these weights would free: none if they are not cached, held or pinned."""
        return 0 if self._stays(digest) or digest not in self._weights else self._weights[digest].nbytes

    def drop(self, digest: str) -> None:
        """Unpin and drop weights, unless they are held."""
        self._pins.discard(digest)
        if digest in self._weights and not self._stays(digest):
            self._weights.pop(digest).close()

    def close(self) -> None:
        """Drop all weights."""
        for weights in self._weights.values():
            weights.close()
        self._weights.clear()

    def _stays(self, digest: str) -> bool:
        return digest in self._pins or self._holds[digest] > 0

    def _make_room(self, version: Version, drops: bool) -> None:
        staying = sum(weights.nbytes for digest, weights in self._weights.items() if self._stays(digest))
        if not drops and self.nbytes + version.nbytes > self.limit:
            raise HostMemoryError(
                f"the weights take {version.nbytes >> 20} MiB, but {(self.limit - self.nbytes) >> 20} MiB of "
                f"--host-cache {self.limit >> 20} MiB are free; increase --host-cache"
            )
        if staying + version.nbytes > self.limit:
            raise HostMemoryError(
                f"the weights take {version.nbytes >> 20} MiB, but --host-cache is {self.limit >> 20} MiB, and "
                f"{staying >> 20} MiB of it are in use or pinned; increase --host-cache, or unpin a variant"
            )
        for digest in [digest for digest in self._weights if not self._stays(digest)]:
            if self.nbytes + version.nbytes <= self.limit:
                return
            self._weights.pop(digest).close()


class BaseWeights:
    """W0, to restore the base's weights: the base's files, or copies of the tensors that variants change.

    Args:
        base: the checkpoint.
        on_host: copy tensors to host memory when they are prepared.
    """

    def __init__(self, base: Checkpoint, on_host: bool) -> None:
        self._on_host = on_host
        self._base = base
        self._copies: list[HostWeights] = []
        self._copying = asyncio.Lock()
        self.tensors: dict[str, TensorInfo] = dict(base.tensors)

    @property
    def nbytes(self) -> int:
        """Size of the copies."""
        return sum(copy.nbytes for copy in self._copies)

    async def prepare(self, names: Iterable[str]) -> None:
        """Make sure that tensors can be read.

        Raises `CheckpointError` if the base's files have changed, and `HostMemoryError` if the copies do not fit.
        """
        if not self._on_host:
            self._base.check_unchanged()
        elif missing := self._missing(names):
            await asyncio.shield(self._copy(missing))  # see `HostCache.load`

    def _missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.tensors[name] is self._base.tensors[name]]

    async def _copy(self, names: list[str]) -> None:
        async with self._copying:
            if missing := self._missing(names):  # without those copied while waiting for the lock
                copy = await asyncio.to_thread(host_copy, self._base, missing)
                self._copies.append(copy)
                self.tensors |= copy.tensors


def host_copy(base: Checkpoint, names: Iterable[str]) -> HostWeights:
    """Copy tensors of the base to host memory, unchanged."""
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
