"""Which LoRA adapters are in the engine's slots, as vLLM decides it: the ones in use, then the ones used last."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class LoraSlots:
    """What the engine has room for.

    Attributes:
        count: LoRA adapters at once.
        max_rank: the largest rank of one.
        seats: requests in a step.
    """

    count: int = 0
    max_rank: int = 0
    seats: int = 256


def rank_of_pairs(ranks: Mapping[str, int]) -> int:
    """The largest rank of a complement: the sum of the two largest ranks of variants, by name."""
    return sum(sorted(ranks.values())[-2:])


def unfit_pairs(ranks: Mapping[str, int], max_rank: int) -> list[tuple[str, str]]:
    """Pairs of variants that have no complement of the largest rank that the engine takes, the largest sums first."""
    by_rank = sorted(ranks, key=lambda name: (-ranks[name], name))
    return [(one, other) for one, other in combinations(by_rank, 2) if ranks[one] + ranks[other] > max_rank]


class AdapterSlots:
    """For one event loop. vLLM reports only adapters with requests, but a loaded one costs the next request nothing.

    Args:
        count: number of slots (`--max-loras`); 0 without LoRA.
        starts: number of times the engine was started again or got other weights: the slots are empty then.
    """

    def __init__(self, count: int, starts: Callable[[], int]) -> None:
        self.count, self._starts = count, starts
        self._start = starts()
        self._requests: dict[str, int] = {}  # digest -> requests that use it, in the order in which they began
        self._idle: OrderedDict[str, None] = OrderedDict()  # the one used last at the end

    @contextmanager
    def using(self, digest: str) -> Iterator[None]:
        """A request uses an adapter while the context is open."""
        self._notice_restart()
        self._idle.pop(digest, None)
        self._requests[digest] = self._requests.get(digest, 0) + 1
        start = self._start
        try:
            yield
        finally:
            self._notice_restart()
            self._requests[digest] -= 1
            if not self._requests[digest]:
                del self._requests[digest]
                if start == self._start:
                    self._idle[digest] = None
                    while len(self._idle) > self.count:
                        self._idle.popitem(last=False)

    def loaded(self) -> list[str]:
        """Digests of the adapters in the slots."""
        self._notice_restart()
        return [*self._requests, *reversed(self._idle)][: self.count]

    def waiting(self) -> list[str]:
        """Digests of adapters whose requests wait in the engine until a slot is free."""
        return list(self._requests)[self.count :]

    def _notice_restart(self) -> None:
        if self._start != self._starts():
            self._start = self._starts()
            self._idle.clear()
