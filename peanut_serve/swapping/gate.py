"""Who may use the engine: requests for the active variant at once, those for others when their turn comes.

The decisions are in `scheduling.py`; here are the requests they are about. For one event loop.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from peanut_serve.errors import QueueFullError
from peanut_serve.swapping.policy import Queue


@dataclass(eq=False)
class Ticket:
    """A request that waits, or runs.

    Attributes:
        digest: whose weights it needs.
        arrival: monotonic seconds.
        abort: ends it while it runs, with an error for the client.
        turn: done when it may run.
    """

    digest: str
    arrival: float
    abort: Callable[[], None]
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Gate:
    """Admits requests, of one variant at a time.

    Args:
        active: digest of the weights in the engine.

    Attributes:
        changed: set when a request came, left or ended; whoever waits for it clears it.
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
        """Wait for a request's turn; `leave` has to follow. Raises what `refuse` was given."""
        self._queues.setdefault(ticket.digest, deque()).append(ticket)
        self._admit()
        self.changed.set()
        try:
            await ticket.turn
        except BaseException:
            self.leave(ticket)
            raise

    def leave(self, ticket: Ticket) -> None:
        """A request has ended, or its client has gone."""
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
        """What waits."""
        return tuple(Queue(digest, tuple(t.arrival for t in queue)) for digest, queue in self._queues.items())

    def waiting(self, digest: str) -> int:
        """How many requests for a version wait."""
        return len(self._queues.get(digest, ()))

    async def drain(self, patience: float) -> None:
        """Admit nobody, and return when no request runs; what still runs after `patience` seconds is ended."""
        self._is_open = False
        try:
            await asyncio.wait_for(self._idle.wait(), patience if patience > 0 else 0.001)
        except asyncio.TimeoutError:
            for ticket in list(self.running):
                ticket.abort()
            await self._idle.wait()

    def close(self) -> None:
        """Admit nobody any more."""
        self._is_open = False

    def open(self, active: str) -> None:
        """The engine computes with this, and may be used."""
        if active != self.active:
            self.active, self.since = active, time.monotonic()
        self._is_open = True
        self._admit()

    def refuse(self, digest: str | None, error: Exception) -> None:
        """End the waiting for a version, or for all, with an error."""
        for refused in list(self._queues) if digest is None else [digest]:
            for ticket in self._queues.pop(refused, ()):
                if not ticket.turn.done():
                    ticket.turn.set_exception(error)

    def _admit(self) -> None:
        if not self._is_open:
            return
        for ticket in self._queues.pop(self.active, ()):
            if not ticket.turn.done():
                ticket.turn.set_result(None)
                self.running.add(ticket)
                self._idle.clear()


class Places:
    """A bounded number of requests, whether they wait or run.

    Args:
        limit: how many may wait; those that run are vLLM's to limit.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0

    def take(self, retry_after: int) -> None:
        """Take a place. Raises `QueueFullError`."""
        if self.taken >= self.limit:
            raise QueueFullError(f"{self.taken} requests wait already, and --max-queue is {self.limit}", retry_after)
        self.taken += 1

    def give_back(self) -> None:
        """The request waits no longer."""
        self.taken -= 1
