"""Bounds the evaluations of variants: one runs at a time, as it uses all cores, and a few may wait."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from peanut_serve.errors import QueueFullError

T = TypeVar("T")

_FIRST_ESTIMATE = 2.0  # seconds
_WEIGHT = 0.3  # of the last evaluation in the estimate


class Evaluations:
    """For one event loop.

    Args:
        limit: how many may wait or run.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._running = asyncio.Lock()
        self._seconds = _FIRST_ESTIMATE

    async def run(self, digest: str, evaluate: Callable[[], Awaitable[T]]) -> T:
        """Evaluate a version, after those that wait already; all that ask for it at the same time share the result.

        A running evaluation is not cancelled with its caller.

        Raises `QueueFullError`, and what `evaluate` raises.
        """
        task: asyncio.Task[T] | None = self._tasks.get(digest)
        if task is None:
            if len(self._tasks) >= self.limit:
                raise QueueFullError(
                    f"{len(self._tasks)} variants are being evaluated, and --max-evaluations is {self.limit}",
                    max(1, math.ceil(self._seconds * len(self._tasks))),
                )
            task = self._tasks[digest] = asyncio.create_task(self._run(evaluate))
            task.add_done_callback(lambda done: self._end(digest, done))
        return await asyncio.shield(task)

    async def _run(self, evaluate: Callable[[], Awaitable[T]]) -> T:
        async with self._running:
            start = time.monotonic()
            found = await evaluate()
            self._seconds += _WEIGHT * (time.monotonic() - start - self._seconds)
            return found

    def _end(self, digest: str, task: "asyncio.Task[Any]") -> None:
        del self._tasks[digest]
        if not task.cancelled():
            task.exception()  # retrieved, even if every caller was cancelled
