"""Which variant's merged weights the engine should have, of those that LoRA can express: pure decisions.

A step of the engine costs less if no request in it has a LoRA adapter. So what a resident saves is the part of all
steps that have requests for it alone. It follows from its share of the traffic:

- `p ** n` if requests are mixed by chance, where n is their number in a step and p the share of the resident;
- `1 - (1 - p) (1 + n / g)` if others are admitted in groups of g: a group is in the engine for as long as one of its
  requests, and for as long as it takes until all of them have a place.

Whoever would have saved more gains the difference for as long as it lasts, and loses it again if that turns round,
but never falls below zero. A change happens when the gain is several times what the change costs. So a burst, which
ends before it could have paid, changes nothing, and traffic that alternates cannot make the engine change all the
time.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from peanut_serve.swapping.adaptive.gathering import Gathering

# gained before a change, as a multiple of its cost: at worst, changes that never pay take `saving / _FACTOR` of the
# time
_FACTOR = 4.0
# seconds over which the load is smoothed: about the duration of some requests
_SMOOTHING = 10.0
_NEGLIGIBLE = 1e-3  # requests in the engine, on average


@dataclass(frozen=True)
class Costs:
    """What is measured or set.

    Attributes:
        saving: part of a step's time that is saved if no request in it has a LoRA adapter.
        change_seconds: what a change of the resident costs, its drain included.
        gathering: how others are gathered.
    """

    saving: float
    change_seconds: float
    gathering: Gathering


@dataclass(frozen=True)
class Demand:
    """The demand for one version.

    Attributes:
        running: requests in the engine, on average over the time.
        rate: requests that are admitted, per second.
    """

    running: float
    rate: float


Load = Mapping[str, Demand]  # digest -> its demand


def smoothed(before: Load, now: Load, seconds: float) -> dict[str, Demand]:
    """The load after a look of so many seconds: a mean that is weighted towards the latest."""
    weight, none = 1.0 - math.exp(-seconds / _SMOOTHING), Demand(0.0, 0.0)
    found = {}
    for digest in {**before, **now}:
        old, new = before.get(digest, none), now.get(digest, none)
        running = old.running + weight * (new.running - old.running)
        if running >= _NEGLIGIBLE or digest in now:
            found[digest] = Demand(running, old.rate + weight * (new.rate - old.rate))
    return found


def saved(digest: str, load: Load, costs: Costs) -> float:
    """Seconds of the engine that a resident saves per second, compared with all requests as LoRA.

    Args:
        digest: of the resident; also that of the base, whose requests need no adapter on its own weights.
        load: of all versions that share the engine.
        costs: what is saved in a step, and how others are gathered.
    """
    total = sum(demand.running for demand in load.values())
    if digest not in load or total < _NEGLIGIBLE:
        return 0.0
    share = load[digest].running / total
    together = max(1.0, min(total, costs.gathering.seats))  # requests in a step
    others = sum(demand.rate for other, demand in load.items() if other != digest)
    group = 1.0 + others * costs.gathering.bound(total)
    alone = max(share**together, 1.0 - (1.0 - share) * (1.0 + together / group))
    return costs.saving * min(1.0, total) * alone


@dataclass(frozen=True)
class Choice:
    """The state of the policy.

    Attributes:
        resident: digest of the version whose merged weights the engine should have; that of the base at first.
        load: smoothed.
        gains: digest -> seconds of the engine that it would have saved beyond what the resident did.
        saved: seconds of the engine that residents have saved so far, by this estimate.
    """

    resident: str
    load: Load = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)
    saved: float = 0.0

    def after(self, now: Load, seconds: float, costs: Costs, able: Collection[str]) -> "Choice":
        """The state after a look.

        Args:
            now: the demand during the look.
            seconds: its duration.
            costs: of a change, as measured so far.
            able: digests of those that can be residents.
        """
        load = smoothed(self.load, now, seconds)
        own = saved(self.resident, load, costs)
        rates = {one: saved(one, load, costs) - own for one in load if one != self.resident and one in able}
        gains = {digest: self.gains.get(digest, 0.0) + rate * seconds for digest, rate in rates.items()}
        gains = {digest: gain for digest, gain in gains.items() if gain > 0}
        resident, best = self.resident, max(gains, key=lambda digest: (gains[digest], digest), default=None)
        if best is not None and gains[best] >= _FACTOR * costs.change_seconds and rates[best] > 0:
            resident, gains = best, {}
        return Choice(resident, load, gains, self.saved + own * seconds)

    def at(self, resident: str) -> "Choice":
        """The state if the engine has another resident than it should have: after a failure, or by an operator."""
        return self if resident == self.resident else Choice(resident, self.load, {}, self.saved)
