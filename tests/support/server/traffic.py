"""A server with one set of weights, simulated event by event; what is asked of it; and naive disciplines to beat."""

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from math import inf
from statistics import fmean

from peanut_serve.swapping.policy import Policy, Queue, View, next_look, next_variant


@dataclass(frozen=True)
class Request:
    """One request. Times are in seconds."""

    arrival: float
    digest: str
    service: float  # in the engine, once it runs


@dataclass(frozen=True)
class Server:
    """What is simulated."""

    slots: int = 16  # requests that run at once; the engine queues what it was given beyond
    swap_seconds: float = 1.0  # nothing runs meanwhile


@dataclass(frozen=True)
class State:
    """What a discipline decides on."""

    now: float
    active: str
    since: float
    running: int
    waiting: tuple[Request, ...]  # by arrival
    server: Server


@dataclass(frozen=True)
class Choice:
    """What a discipline decided."""

    admitted: list[Request]  # of the active variant, into the engine
    wanted: str  # whose weights the engine should have
    look: float = inf  # when to ask again if nothing happens before


Discipline = Callable[[State], Choice]


@dataclass
class Outcome:
    """What came of a trace."""

    waits: dict[Request, float] = field(default_factory=dict)  # seconds from arrival to admission
    latencies: dict[Request, float] = field(default_factory=dict)  # seconds from arrival to answer
    swaps: int = 0
    makespan: float = 0.0  # when the last one was answered
    peak: int = 0  # most requests in the engine

    @property
    def mean(self) -> float:
        return fmean(self.latencies.values())

    @property
    def p99(self) -> float:
        return sorted(self.latencies.values())[int(0.99 * (len(self.latencies) - 1))]


class _Engine:
    """Runs what it is given, in order, some at once."""

    def __init__(self, slots: int) -> None:
        self.free = slots
        self.running: list[tuple[float, int, Request]] = []  # by when they end
        self.queued: deque[Request] = deque()
        self.count = 0

    def __len__(self) -> int:
        return len(self.running) + len(self.queued)

    @property
    def next_end(self) -> float:
        return self.running[0][0] if self.running else inf

    def admit(self, now: float, requests: Iterable[Request]) -> None:
        self.queued.extend(requests)
        while self.queued and self.free:
            request = self.queued.popleft()
            self.free -= 1
            self.count += 1
            heapq.heappush(self.running, (now + request.service, self.count, request))

    def finish(self, now: float) -> list[Request]:
        ended = []
        while self.next_end <= now:
            ended.append(heapq.heappop(self.running)[2])
            self.free += 1
        self.admit(now, ())
        return ended


def simulate(trace: list[Request], discipline: Discipline, server: Server) -> Outcome:
    """Serve a trace until every request is answered.

    Raises `RuntimeError` when that never ends.
    """
    outcome, engine = Outcome(), _Engine(server.slots)
    coming, waiting = deque(trace), list[Request]()
    now, active, since, applied = 0.0, trace[0].digest, 0.0, inf
    wanted = active
    for _ in range(100 * len(trace)):
        while coming and coming[0].arrival <= now:
            waiting.append(coming.popleft())
        outcome.latencies.update({request: now - request.arrival for request in engine.finish(now)})
        if len(outcome.latencies) == len(trace):
            outcome.makespan = now
            return outcome
        if applied <= now:
            active, since, applied = wanted, now, inf
        look = inf
        if applied == inf:
            choice = discipline(State(now, active, since, len(engine), tuple(waiting), server))
            if choice.admitted:
                outcome.waits.update({request: now - request.arrival for request in choice.admitted})
                waiting = [request for request in waiting if request not in outcome.waits]
                engine.admit(now, choice.admitted)
                outcome.peak = max(outcome.peak, len(engine))
                continue  # the rest is decided on what it runs now
            wanted, look = choice.wanted, choice.look
            if wanted != active and not engine:
                outcome.swaps += 1
                applied = now + server.swap_seconds
        now = min(coming[0].arrival if coming else inf, engine.next_end, applied, look)
    raise RuntimeError(f"{len(waiting)} requests wait for ever, the active variant is {active}")


def ours(policy: Policy) -> Discipline:
    """What the server does."""

    def choose(state: State) -> Choice:
        own = [request for request in state.waiting if request.digest == state.active]
        if own and state.now == state.since:
            return Choice(own, state.active)  # whom a swap was for is admitted after it, come what may
        arrivals: dict[str, list[float]] = {}
        for request in state.waiting:
            arrivals.setdefault(request.digest, []).append(request.arrival)
        queues = tuple(Queue(digest, tuple(times)) for digest, times in arrivals.items())
        view = View(state.now, state.active, state.since, state.running, queues, state.server.swap_seconds)
        wanted, look = next_variant(view, policy), next_look(view, policy)
        return Choice(own if wanted == state.active else [], wanted, inf if look is None else look)

    return choose


def first_come(state: State) -> Choice:
    """Strictly by arrival: those of one variant that follow each other run together."""
    head = list(takewhile(lambda request: request.digest == state.active, state.waiting))
    return Choice(head, state.waiting[0].digest if state.waiting else state.active)


def one_by_one(state: State) -> Choice:
    """Strictly by arrival, one at a time."""
    if state.running or not state.waiting:
        return Choice([], state.active)
    head = state.waiting[0]
    return Choice([head] if head.digest == state.active else [], head.digest)


def steady(seed: int, count: int, rate: float, weights: list[float]) -> list[Request]:
    """Requests at a mean rate per second, for variants by weight."""
    dice = random.Random(seed)
    digests = dice.choices([f"v{index}" for index in range(len(weights))], weights, k=count)
    times = accumulate(dice.expovariate(rate) for _ in digests)
    return [Request(time, digest, dice.uniform(0.5, 1.5)) for time, digest in zip(times, digests, strict=True)]


def bursts(seed: int, count: int, gap: float, size: int, variants: int) -> list[Request]:
    """Some bursts of up to twice `size` requests for one variant within a second, on average `gap` seconds apart."""
    dice = random.Random(seed)
    requests = []
    for start in accumulate(dice.expovariate(1 / gap) for _ in range(count)):
        digest = f"v{dice.randrange(variants)}"
        times = [start + dice.random() for _ in range(dice.randint(1, 2 * size))]
        requests += [Request(time, digest, dice.uniform(0.5, 1.5)) for time in times]
    return sorted(requests, key=lambda request: request.arrival)


TRACES = {
    "light": steady(0, 300, 0.4, [1.0] * 4),  # even strict order keeps up
    "uniform": steady(1, 600, 2.0, [1.0] * 4),
    "zipf": steady(2, 600, 2.0, [1 / (rank + 1) for rank in range(8)]),
    "bursts": bursts(3, 60, 3.0, 8, 6),
}
