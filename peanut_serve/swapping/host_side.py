"""Prepares the weights that a swap reads in host memory, before the engine is changed."""

import logging
import time
from contextlib import ExitStack

from peanut_serve.swapping import metrics
from peanut_serve.swapping.swappable import SwappableEngine
from peanut_serve.variants.evaluations import Evaluations
from peanut_serve.variants.host_cache import HostCache
from peanut_serve.variants.version import Version

logger = logging.getLogger("vllm.peanut_serve")


class HostSide:
    """Evaluates versions, and keeps held and pinned weights.

    Args:
        limit: of evaluated weights, in bytes.
        evaluations: bounds the evaluations.
        swappable: the engine whose model is served.

    Attributes:
        cache: the evaluated weights.
    """

    def __init__(self, limit: int, evaluations: Evaluations, swappable: SwappableEngine) -> None:
        self.cache = HostCache(limit, evaluations)
        self._model, self._base_weights = swappable.model, swappable.base_weights
        self._pinned: dict[str, str] = {}  # name -> digest

    @property
    def base_copy_bytes(self) -> int:
        """Size of the tensors of the base that are kept in host memory."""
        return self._base_weights.nbytes

    async def prepare(self, version: Version, holds: ExitStack) -> None:
        """Do everything that can fail before the engine is changed. The weights are held until `holds` is closed.

        Raises `HostMemoryError` if the weights do not fit, and what their evaluation raises.
        """
        # hold first: otherwise the weights may be dropped before the engine has them
        holds.enter_context(self.cache.holding(version.digest))
        start, is_known = time.perf_counter(), self.cache.get(version.digest) is not None
        weights = await self.cache.load(version)
        await self._base_weights.prepare(self._model.with_neighbours(weights.tensors))
        if not is_known:
            seconds = time.perf_counter() - start
            metrics.EVALUATIONS.observe(seconds)
            logger.info("digest=%s evaluated_seconds=%.2f", version.digest[:12], seconds)
        metrics.HOST_CACHE.set(self.cache.nbytes)
        metrics.BASE_COPY.set(self._base_weights.nbytes)

    def update_pin(self, name: str, is_pinned: bool, version: Version | None) -> None:
        """If a name is pinned, pin its version's weights; unpin those that were pinned for it before."""
        old = self._pinned.pop(name, None)
        digest = version.digest if version is not None else old
        if is_pinned and digest is not None:
            self._pinned[name] = digest
            self.cache.pin(digest, True)
        if old is not None and old not in self._pinned.values():
            self.cache.pin(old, False)
