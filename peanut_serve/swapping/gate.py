"""Admits requests to the engine: those for the active variant immediately, those for others after a swap.

`policy.py` decides on the swaps; this module holds the requests. For one event loop.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from peanut_serve.errors import QueueFullError
from peanut_serve.swapping.policy import Queue

logger = logging.getLogger("vllm.peanut_serve")

ABORT_SECONDS = 10.0  # for aborted requests to tell their clients, and to end


@dataclass(eq=False)
class Ticket:
    """A request that is waiting or running.

    Attributes:
        digest: of the weights it needs.
        arrival: monotonic seconds.
        abort: ends the running request, with an error for the client.
        name: of the variant that it names.
        admission: done when it may run.
    """

    digest: str
    arrival: float
    abort: Callable[[], None]
    name: str = ""
    admission: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Gate:
    """Admits requests for one variant at a time.

    Args:
        active: digest of the weights in the engine.

    Attributes:
        changed: set when a request arrives or leaves; cleared by the task that waits for it.
    """

    def __init__(self, active: str) -> None:
        self.active = active
        self.since = time.monotonic()
        self.running: set[Ticket] = set()
        self._queues: dict[str, deque[Ticket]] = {}
        self._is_open = True
        self.changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def enter(self, ticket: Ticket) -> None:
        """Wait until a request may run; call `leave` after it. Raises the error passed to `refuse`."""
        self._queues.setdefault(ticket.digest, deque()).append(ticket)
        self._admit()
        self.changed.set()
        try:
            await ticket.admission
        except BaseException:
            self.leave(ticket)
            raise

    def leave(self, ticket: Ticket) -> None:
        """Remove a request that has ended, or whose client has disconnected."""
        self.running.discard(ticket)
        queue = self._queues.get(ticket.digest)
        if queue is not None and ticket in queue:
            queue.remove(ticket)
            if not queue:
                del self._queues[ticket.digest]
        if not self.running:
            self._idle.set()
        self.changed.set()

    def queues(self) -> tuple[Queue, ...]:
        """The waiting requests, by version."""
        return tuple(Queue(digest, tuple(t.arrival for t in queue)) for digest, queue in self._queues.items())

    def waiting_names(self) -> list[str]:
        """The variant that each of the waiting requests names."""
        return [ticket.name for queue in self._queues.values() for ticket in queue]

    def running_names(self) -> list[str]:
        """The variant that each of the running requests names."""
        return [ticket.name for ticket in self.running]

    async def drain(self, seconds: float) -> None:
        """Admit no requests, and return when none is running; those still running after `seconds` are aborted.

        A request that has not ended `ABORT_SECONDS` after that no longer counts as running: nothing that it still
        does may use the engine.
        """
        self._is_open = False
        if await self._is_idle_within(seconds):
            return
        for ticket in list(self.running):
            ticket.abort()
        if not await self._is_idle_within(ABORT_SECONDS):
            logger.error("%d aborted requests have not ended, and are left behind", len(self.running))
            for ticket in list(self.running):
                self.leave(ticket)

    async def _is_idle_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._idle.wait(), max(seconds, 0.001))
        except asyncio.TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Admit no more requests."""
        self._is_open = False

    def open(self, active: str) -> None:
        """Admit the requests for the weights that the engine has now."""
        if active != self.active:
            self.active, self.since = active, time.monotonic()
        self._is_open = True
        self._admit()

    def refuse(self, digest: str | None, error: Exception) -> None:
        """Reject the requests waiting for a version, or for all, with an error."""
        for refused in list(self._queues) if digest is None else [digest]:
            for ticket in self._queues.pop(refused, ()):
                if not ticket.admission.done():
                    ticket.admission.set_exception(error)

    def _admit(self) -> None:
        if not self._is_open:
            return
        for ticket in self._queues.pop(self.active, ()):
            if not ticket.admission.done():
                ticket.admission.set_result(None)
                self.running.add(ticket)
                self._idle.clear()


class Places:
    """Bounds the number of waiting requests.

    Args:
        limit: how many may wait; vLLM limits those that run.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0

    def take(self, retry_after: int) -> None:
        """Take a place. Raises `QueueFullError`."""
        if self.taken >= self.limit:
            raise QueueFullError(f"{self.taken} requests are waiting, and --max-queue is {self.limit}", retry_after)
        self.taken += 1

    def give_back(self) -> None:
        """Release the place of a request that no longer waits."""
        self.taken -= 1
