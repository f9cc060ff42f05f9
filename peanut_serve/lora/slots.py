"""Which LoRA adapters are in the engine's slots, as vLLM decides it: the ones in use, then the ones used last."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class AdapterSlots:
    """For one event loop. vLLM reports only adapters with requests, but a loaded one costs the next request nothing.

    Args:
        count: number of slots (`--max-loras`); 0 without LoRA.
        starts: number of times the engine was started again: the slots of a new engine are empty.
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
