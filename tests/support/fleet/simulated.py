"""A fleet of engines, simulated event by event: each swaps by the product's own policy; what is asked of it.

A replica runs up to `slots` requests of its resident variant at once. A swap takes `swap_seconds` and a
drained engine.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count

from peanut_serve.ray.placement import Replica
from peanut_serve.swapping.policy import Policy, Queue, View, next_look, next_variant

VARIANTS = [f"v{number}" for number in range(200)]


@dataclass(frozen=True)
class Load:
    """What is asked of a fleet. Times are in seconds, rates in requests per second."""

    replicas: int = 8
    rate: float = 8.0
    swap_seconds: float = 0.5
    service: float = 0.5  # mean; exponential
    seconds: float = 200.0
    exponent: float = 1.0  # of Zipf's law; 0: every variant as often as any other
    shift_every: float = 0.0  # seconds after which other variants are the popular ones; 0: never
    burst: float = 1.0  # mean number of requests for one variant that come at once
    slots: int = 32


@dataclass(frozen=True)
class Outcome:
    """What came of it: swaps per request, and the time from arrival to answer in seconds."""

    swaps: float
    p50: float
    p95: float
    p99: float


@dataclass(eq=False)
class Engine:
    """One replica."""

    name: str
    resident: str = ""
    since: float = 0.0
    running: int = 0
    swapping: bool = False
    swaps: int = 0
    wanted: str = ""  # what it swaps to once it is drained
    look: int = 0  # of all moments at which to look again, the latest counts
    waiting: dict[str, deque[float]] = field(default_factory=dict)

    def view(self) -> Replica:
        resident = frozenset([self.resident] if self.resident else [])
        return Replica(
            self.name, resident, 1, {name: len(queue) for name, queue in self.waiting.items()}, self.running
        )


Router = Callable[[str, Sequence[Engine], float], Engine]


def simulate(load: Load, router: Router, seed: int) -> Outcome:
    """Serve every request of a load, whose random numbers come from the seed."""
    return _Fleet(load, router, random.Random(seed)).run()


class _Fleet:
    def __init__(self, load: Load, router: Router, random_numbers: random.Random) -> None:
        self.load, self.router, self.random = load, router, random_numbers
        self.engines = [Engine(f"replica-{number}") for number in range(load.replicas)]
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.order = count()
        self.latencies: list[float] = []

    def run(self) -> Outcome:
        for at, variant in _requests(self.load, self.random):
            self._at(at, lambda now, variant=variant: self._arrive(now, variant))
        while self.events:
            now, _, happens = heapq.heappop(self.events)
            happens(now)
        ordered = sorted(self.latencies)
        at = [ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95, 0.99)]
        return Outcome(sum(engine.swaps for engine in self.engines) / len(ordered), *at)

    def _at(self, moment: float, happens: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (moment, next(self.order), happens))

    def _arrive(self, now: float, variant: str) -> None:
        engine = self.router(variant, self.engines, now)
        engine.waiting.setdefault(variant, deque()).append(now)
        self._step(engine, now)

    def _step(self, engine: Engine, now: float) -> None:
        if engine.swapping:
            return
        self._admit(engine, now, engine.resident)
        queues = tuple(Queue(name, tuple(arrivals)) for name, arrivals in engine.waiting.items())
        if not queues:
            return
        price = self.load.swap_seconds
        view = View(now, engine.resident, engine.since, engine.running, queues, price)
        wanted = next_variant(view, Policy())
        if wanted != engine.resident:
            engine.swapping, engine.wanted = True, wanted
            self._swap_if_drained(engine, now)
        elif (moment := next_look(view, Policy())) is not None:
            engine.look += 1
            self._at(max(moment, now + 1e-6), lambda now, look=engine.look: self._look(engine, now, look))

    def _admit(self, engine: Engine, now: float, variant: str) -> None:
        queue = engine.waiting.get(variant, deque())
        while queue and engine.running < self.load.slots:
            arrival = queue.popleft()
            engine.running += 1
            end = now + self.random.expovariate(1 / self.load.service)
            self._at(end, lambda now, arrival=arrival: self._end(engine, now, arrival))
        if variant in engine.waiting and not queue:
            del engine.waiting[variant]

    def _swap_if_drained(self, engine: Engine, now: float) -> None:
        if not engine.running:
            engine.swaps += 1
            self._at(now + self.load.swap_seconds, lambda now: self._swapped(engine, now))

    def _swapped(self, engine: Engine, now: float) -> None:
        engine.swapping, engine.resident, engine.since = False, engine.wanted, now
        self._step(engine, now)

    def _end(self, engine: Engine, now: float, arrival: float) -> None:
        engine.running -= 1
        self.latencies.append(now - arrival)
        if engine.swapping:
            self._swap_if_drained(engine, now)
        else:
            self._step(engine, now)

    def _look(self, engine: Engine, now: float, look: int) -> None:
        if look == engine.look:
            self._step(engine, now)


def _requests(load: Load, numbers: random.Random) -> Iterator[tuple[float, str]]:
    weights = list(accumulate(1 / (place + 1) ** load.exponent for place in range(len(VARIANTS))))
    names, shifted, now = list(VARIANTS), load.shift_every, 0.0
    while now < load.seconds:
        now += numbers.expovariate(load.rate / load.burst)
        if load.shift_every and now > shifted:
            shifted += load.shift_every
            numbers.shuffle(names)
        variant = numbers.choices(names, cum_weights=weights)[0]
        for _ in range(max(1, round(numbers.expovariate(1 / load.burst))) if load.burst > 1 else 1):
            yield now, variant
