"""Counts the requests that share the engine, as the policy wants to know them."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from peanut_serve.swapping.adaptive.policy import Demand
from peanut_serve.variants.version import Version


class DemandMeter:
    """For one event loop.

    Attributes:
        used: digest -> the name and the version that was asked for, of all since the last look.
    """

    def __init__(self) -> None:
        self.used: dict[str, tuple[str, Version]] = {}
        self._running = Counter[str]()
        self._seconds = defaultdict[str, float](float)  # request-seconds in the engine
        self._admitted = Counter[str]()
        self._since = self._looked = time.monotonic()

    @contextmanager
    def serving(self, name: str, version: Version) -> Iterator[None]:
        """A request for a version is in the engine while the context is open."""
        self._advance()
        self.used[version.digest] = name, version
        self._admitted[version.digest] += 1
        self._running[version.digest] += 1
        try:
            yield
        finally:
            self._advance()
            self._running[version.digest] -= 1
            if not self._running[version.digest]:
                del self._running[version.digest]

    def look(self) -> tuple[dict[str, Demand], float]:
        """The demand since the last look, and its duration in seconds."""
        self._advance()
        seconds = max(self._since - self._looked, 1e-6)
        self._looked = self._since
        found = {
            digest: Demand(self._seconds[digest] / seconds, self._admitted[digest] / seconds)
            for digest in {**self._seconds, **self._admitted}
        }
        self.used = {digest: one for digest, one in self.used.items() if digest in self._running}
        self._seconds.clear()
        self._admitted.clear()
        return found, seconds

    def _advance(self) -> None:
        now = time.monotonic()
        for digest, count in self._running.items():
            self._seconds[digest] += count * (now - self._since)
        self._since = now
