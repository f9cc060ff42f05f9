"""The variant that the policy is going to swap to next: the workers map its weights, and take its factors, before.

A wrong guess costs a copy that the workers replace with the next one; it changes no weights.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from peanut_serve.swapping import metrics
from peanut_serve.swapping.policy import Policy, View, next_look, next_variant
from peanut_serve.swapping.transaction import Engine, Loaded
from peanut_serve.variants.host_cache import HostCache
from peanut_serve.variants.on_device.places import Place
from peanut_serve.variants.version import Version

logger = logging.getLogger("vllm.peanut_serve")


def expected_next(view: View, policy: Policy) -> str | None:
    """The digest that the policy swaps to next if no request arrives or ends; None if it is the active one."""
    moment = next_look(view, policy)
    if moment is None:
        return None
    target = next_variant(replace(view, now=moment), policy)
    return target if target != view.active else None


class Staging:
    """Stages one variant at a time. For the task that drives the engine.

    Args:
        engine: its workers are told what they will read.
        changes: the tensors of a swap to a version.
        cache: weights in host memory.
    """

    def __init__(self, engine: Engine, changes: Callable[[Loaded], Sequence[Place]], cache: HostCache) -> None:
        self._engine, self._changes, self._cache = engine, changes, cache
        self._staged: str | None = None
        self._task: asyncio.Task[None] | None = None

    def look(self, view: View, policy: Policy, versions: Mapping[str, Version]) -> None:
        """Begin to stage the version that is expected next, if it is known."""
        target = expected_next(view, policy)
        if target is not None and target in versions:
            self.begin(Loaded(versions[target], self._cache.get(target)))

    def begin(self, target: Loaded) -> None:
        """Begin to stage a version, unless it is staged, or another one is being staged.

        Nothing is staged for the base, nor for a version whose weights were dropped.
        """
        digest = target.version.digest
        is_busy = self._task is not None and not self._task.done()
        if is_busy or digest == self._staged or target.weights is None:
            return
        if self._staged is not None:
            metrics.STAGED.labels("unused").inc()
        self._staged = digest
        self._task = asyncio.create_task(self._stage(target))

    async def _stage(self, loaded: Loaded) -> None:
        digest = loaded.version.digest
        try:
            with self._cache.holding(digest):
                await self._engine.stage(self._changes(loaded))
        except Exception as error:  # the swap will do it, or fail with an error of its own
            logger.warning("digest=%s could not be staged: %s", digest[:12], error)
            if self._staged == digest:
                self._staged = None

    def used(self, digest: str) -> None:
        """Count whether what was staged was the version that the engine was swapped to."""
        if self._staged is not None:
            metrics.STAGED.labels("used" if self._staged == digest else "unused").inc()
        self._staged = None

    def stop(self) -> None:
        """Stage nothing more."""
        if self._task is not None:
            self._task.cancel()
