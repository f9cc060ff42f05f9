"""Which replica of a fleet gets a request: pure decisions, without Ray.

A replica is one engine. The cost of a request there is counted in turns, each of which stands for about one swap of
weights: the turns of other variants that come first, its own turn, and the turns that it causes others to need. The
fewest swaps are not the aim: a hash of the variant's name swaps least, and whoever shares a replica with a busy
variant then waits longest. The constants were chosen by simulation (tests/ray/test_simulated_fleet.py).
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_TIE = 0.02  # of a turn, for each place in the variant's own order and for each request that a replica has
_FADE = 0.7  # how much of a count is left after a period
_PERIOD = 30.0  # seconds
_MOST = 10_000  # names that are counted: clients choose them


@dataclass(frozen=True)
class Replica:
    """A replica as a front sees it.

    Attributes:
        name: identifies the replica for as long as it lives.
        resident: the variants whose weights the engine has: one in merged mode, the loaded adapters in LoRA mode.
        slots: how many variants can be resident at once.
        waiting: requests that it has and does not run yet, by variant.
        running: requests in the engine, of all variants.
    """

    name: str
    resident: frozenset[str] = frozenset()
    slots: int = 1
    waiting: Mapping[str, int] = field(default_factory=dict)
    running: int = 0

    @property
    def load(self) -> int:
        """The requests that it has."""
        return self.running + sum(self.waiting.values())


class Popularity:
    """The share of each variant in the latest requests: counts that fade."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._faded_at = 0.0

    def count(self, variant: str, now: float) -> None:
        """Count a request for a variant at `now`, in monotonic seconds."""
        if now - self._faded_at > _PERIOD:
            self._faded_at = now
            self._counts = Counter({name: count * _FADE for name, count in self._counts.items() if count > 0.01})
        if variant in self._counts or len(self._counts) < _MOST:
            self._counts[variant] += 1

    def share(self, variants: Collection[str]) -> float:
        """Between 0 and 1: how much of the latest requests was for these variants."""
        total = self._counts.total()
        return sum(self._counts[variant] for variant in variants) / total if total else 0.0


def ranked(variant: str, replicas: Iterable[Replica], popularity: Popularity) -> list[str]:
    """The names of all replicas, the best one for a request for `variant` first."""
    by_name = {replica.name: replica for replica in replicas}
    order = preferred(variant, by_name)
    costs = {
        name: cost(variant, by_name[name], popularity, len(order)) + _TIE * (place + by_name[name].load)
        for place, name in enumerate(order)
    }
    return sorted(order, key=costs.__getitem__)  # stable: equal ones stay in the variant's own order


def preferred(variant: str, names: Iterable[str]) -> Sequence[str]:
    """The replicas in the variant's own order (rendezvous hashing): the same at every front."""
    return sorted(names, key=lambda name: (_weight(variant, name), name), reverse=True)


def cost(variant: str, replica: Replica, popularity: Popularity, replicas: int) -> float:
    """The turns that a request for `variant` costs at a replica of a fleet of this many `replicas`."""
    here = variant in replica.resident
    if replica.slots > 1:  # variants run beside each other: nobody waits for a turn, but an adapter has to be loaded
        full = len(replica.resident) >= replica.slots
        return 0.0 if here else 1.0 + full * min(1.0, popularity.share(replica.resident) * replicas / replica.slots)
    others = sum(count > 0 for name, count in replica.waiting.items() if name != variant)
    ahead = others + (not here) + (not here and replica.running > 0)
    if here or replica.waiting.get(variant):
        return ahead
    caused = 1 + (others > 0)  # one more turn, which those that wait have to sit out
    return ahead + caused + min(1.0, popularity.share(replica.resident) * replicas)  # the evicted one comes back


def _weight(variant: str, name: str) -> bytes:
    return hashlib.blake2b(f"{variant}\0{name}".encode(), digest_size=8).digest()
