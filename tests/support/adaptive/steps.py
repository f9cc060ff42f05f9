"""An engine that answers step by step, simulated: how much LoRA, swaps and adaptive merging answer of a trace.

Clients ask one request after another, as many at once as there are clients. A step gives each request in the engine
one token, and costs more if one of them has a LoRA adapter: as measured on SmolLM2 on a CPU.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from peanut_serve.swapping.adaptive.gathering import Gathering
from peanut_serve.swapping.adaptive.policy import Choice, Costs, Demand
from peanut_serve.swapping.policy import Policy, Queue, View, next_variant

PLAIN, LORA = 0.052, 0.094  # seconds of a step of up to 8 requests, without and with a LoRA adapter in it
SWAP = 0.5  # seconds
SEATS = 8
BASE = "base"

Mix = Callable[[float], dict[str, float]]  # time -> variant -> its share


@dataclass(eq=False)
class Asked:
    """A request: seconds, and tokens that are left."""

    variant: str
    arrival: float
    left: int


@dataclass
class Found:
    """What came of a trace."""

    tokens: Counter[str] = field(default_factory=Counter)
    latencies: dict[str, list[float]] = field(default_factory=dict)
    changes: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens.total() / self.seconds

    def p95(self, *variants: str) -> float:
        found = sorted(one for name in variants for one in self.latencies.get(name, ()))
        return found[int(0.95 * (len(found) - 1))]


class Engine:
    """Clients, a queue in front of the engine, and what runs in it.

    Args:
        mix: what the clients ask for.
        clients: how many ask at once.
        tokens: the mean length of an answer.
    """

    def __init__(self, mix: Mix, clients: int, tokens: int = 64, seed: int = 0) -> None:
        self.now, self.found = 0.0, Found()
        self.waiting: list[Asked] = []  # at the gate
        self.running: list[Asked] = []  # in the engine: the first `SEATS` are in a step, the others are queued there
        self._mix, self._dice, self._tokens = mix, random.Random(seed), tokens
        for _ in range(clients):
            self._ask()

    def _ask(self) -> None:
        shares = self._mix(self.now)
        (variant,) = self._dice.choices(list(shares), list(shares.values()))
        length = self._dice.randint(self._tokens // 2, self._tokens * 3 // 2)
        self.waiting.append(Asked(variant, self.now, length))

    def admit(self, allowed: Callable[[Asked], bool]) -> None:
        self.running += [one for one in self.waiting if allowed(one)]
        self.waiting = [one for one in self.waiting if not allowed(one)]

    def step(self, resident: str) -> None:
        """All in the engine get a token; or nothing happens for a moment, if it is empty."""
        batch = self.running[:SEATS]
        self.now += LORA if any(one.variant != resident for one in batch) else PLAIN
        for one in batch:
            one.left -= 1
            self.found.tokens[one.variant] += 1
            if not one.left:
                self.running.remove(one)
                self.found.latencies.setdefault(one.variant, []).append(self.now - one.arrival)
                self._ask()

    def drain(self, resident: str) -> None:
        """Answer what runs, then change the weights."""
        while self.running:
            self.step(resident)
        self.now += SWAP
        self.found.changes += 1

    def end(self) -> Found:
        self.found.seconds = self.now
        return self.found


def as_lora(engine: Engine, seconds: float) -> Found:
    """The weights of the base, and LoRA for all but it."""
    while engine.now < seconds:
        engine.admit(lambda one: True)
        engine.step(BASE)
    return engine.end()


def as_merged(engine: Engine, seconds: float, policy: Policy = Policy()) -> Found:  # noqa: B008 - it is frozen
    """Merged weights of one variant at a time, swapped as the server does."""
    active, since = BASE, 0.0
    while engine.now < seconds:
        arrivals: dict[str, list[float]] = {}
        for one in engine.waiting:
            arrivals.setdefault(one.variant, []).append(one.arrival)
        queues = tuple(Queue(digest, tuple(times)) for digest, times in arrivals.items())
        view = View(engine.now, active, since, len(engine.running), queues, SWAP)
        wanted = next_variant(view, policy)
        if wanted != active:
            engine.drain(active)
            active, since = wanted, engine.now
        engine.admit(lambda one: one.variant == active)  # noqa: B023 - called at once
        engine.step(active)
    return engine.end()


def as_adaptive(engine: Engine, seconds: float, gather: float, look: float = 1.0) -> Found:
    """A resident that the policy chooses, all others as complements, which are gathered."""
    choice, gathering, looked = Choice(BASE), Gathering(gather, SEATS), 0.0
    costs = Costs(1 - PLAIN / LORA, SWAP + 2.0, gathering)
    busy, admitted = Counter[str](), Counter[str]()
    while engine.now < seconds:
        resident = choice.resident
        others = [one.arrival for one in engine.waiting if one.variant != resident]
        own = sum(one.variant == resident for one in [*engine.waiting, *engine.running])
        before = len(engine.running)
        new = sum(one.variant == resident for one in engine.waiting)
        is_due = bool(others) and gathering.due(others, own, before + new) <= engine.now
        engine.admit(lambda one: is_due or one.variant == resident)  # noqa: B023 - called at once
        admitted.update(one.variant for one in engine.running[before:])
        start = engine.now
        engine.step(resident)
        for one in engine.running:
            busy[one.variant] += engine.now - start  # type: ignore[assignment]
        if (passed := engine.now - looked) >= look:
            load = {name: Demand(busy[name] / passed, admitted[name] / passed) for name in {**busy, **admitted}}
            choice, looked = choice.after(load, passed, costs, {*load, BASE}), engine.now
            busy.clear()
            admitted.clear()
            if choice.resident != resident:
                engine.drain(resident)
    return engine.end()
