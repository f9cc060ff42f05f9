"""Admits requests to the engine: those for the active variant immediately, those for others after a swap.

`policy.py` decides on the swaps; this module holds the requests. For one event loop.

The requests of several versions may share the engine: those that LoRA can express. They wait for the same digest.
With `adaptive/`, one of these versions, the resident, may have the engine's weights, and the others are gathered.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from peanut_serve.errors import QueueFullError, SwapError
from peanut_serve.swapping.adaptive.gathering import Gathering
from peanut_serve.swapping.policy import Queue

logger = logging.getLogger("vllm.peanut_serve")

ABORT_SECONDS = 10.0  # for aborted requests to tell their clients, and to end


@dataclass(eq=False)
class Ticket:
    """A request that is waiting or running.

    Attributes:
        digest: of the weights it needs; of the base's, if it shares the engine with others.
        arrival: monotonic seconds.
        abort: ends the running request, with an error for the client.
        name: of the variant that it names.
        version: digest of the version that it is for.
        fits: whether it can be answered with the weights of this digest, when they are those of its turn.
        admission: done when it may run.
    """

    digest: str
    arrival: float
    abort: Callable[[], None]
    name: str = ""
    version: str = ""
    fits: Callable[[str], bool] = lambda weights: True
    admission: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Gate:
    """Admits requests for one variant at a time, or for several that share the engine.

    Args:
        active: digest of the weights in the engine.
        gathering: how those are gathered that share the engine with its resident.

    Attributes:
        active: what the admitted requests wait for.
        weights: digest of the engine's weights; another one than `active` if they are those of a resident.
        resident: digest of the version that they answer without an adapter.
        changed: set when a request arrives or leaves; cleared by the task that waits for it.
    """

    def __init__(self, active: str, gathering: Gathering = Gathering()) -> None:  # noqa: B008 - it is frozen
        self.active = self.weights = self.resident = active
        self._gathering = gathering
        self._look: asyncio.TimerHandle | None = None
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
        self._admit()  # others were gathered beside it, perhaps
        self.changed.set()

    def queues(self) -> tuple[Queue, ...]:
        """The waiting requests, by version."""
        return tuple(Queue(digest, tuple(t.arrival for t in queue)) for digest, queue in self._queues.items())

    def unfit(self) -> list[str]:
        """The variants whose requests wait because the resident's weights cannot answer them."""
        return [ticket.name for ticket in self._queues.get(self.active, ()) if not ticket.fits(self.weights)]

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

    async def drain_gently(self, seconds: float) -> None:
        """Admit no requests, and return when none is running. Raises `SwapError` if one runs longer than that."""
        self._is_open = False
        if not await self._is_idle_within(seconds) and self.running:
            raise SwapError(f"{len(self.running)} requests ran longer than the {seconds:g} s of --drain-timeout")

    async def _is_idle_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._idle.wait(), max(seconds, 0.001))
        except asyncio.TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Admit no more requests."""
        self._is_open = False

    def open(self, active: str, weights: str | None = None, resident: str | None = None) -> None:
        """Admit the requests for the weights that the engine has now.

        Args:
            active: what the requests wait for.
            weights: digest of the engine's weights, if they are those of a resident.
            resident: digest of its version, then.
        """
        if active != self.active:
            self.active, self.since = active, time.monotonic()
        self.weights, self.resident = weights or active, resident or active
        self._is_open = True
        self._admit()

    def refuse(self, digest: str | None, error: Exception) -> None:
        """Reject the requests waiting for a version, or for all, with an error.

        Those of the active one are rejected only if the engine's weights cannot answer them: they waited for others.
        """
        for refused in list(self._queues) if digest is None else [digest]:
            queue = self._queues.pop(refused, deque())
            if digest == self.active and (kept := [ticket for ticket in queue if ticket.fits(self.weights)]):
                self._queues[refused] = deque(kept)
                queue = deque(ticket for ticket in queue if not ticket.fits(self.weights))
            for ticket in queue:
                if not ticket.admission.done():
                    ticket.admission.set_exception(error)

    def _admit(self) -> None:
        if not self._is_open or self.active not in self._queues:
            return
        able = [ticket for ticket in self._queues[self.active] if ticket.fits(self.weights)]
        others = [ticket for ticket in able if ticket.version != self.resident]
        if others:
            new = len(able) - len(others)
            residents = new + sum(ticket.version == self.resident for ticket in self.running)
            arrivals = [ticket.arrival for ticket in others]
            due = self._gathering.due(arrivals, residents, new + len(self.running))
            if (left := due - time.monotonic()) > 0:
                able = [ticket for ticket in able if ticket.version == self.resident]
                self._look_in(left)
        taken = set(able)
        self._queues[self.active] = deque(ticket for ticket in self._queues[self.active] if ticket not in taken)
        if not self._queues[self.active]:
            del self._queues[self.active]
        for ticket in able:
            if not ticket.admission.done():
                ticket.admission.set_result(None)
                self.running.add(ticket)
                self._idle.clear()

    def _look_in(self, seconds: float) -> None:
        """Admit those that are gathered, after so many seconds."""
        if self._look is not None:
            self._look.cancel()
        self._look = asyncio.get_running_loop().call_later(seconds, self._admit)


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
