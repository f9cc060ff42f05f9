"""The names in the folders of variants, read off the event loop and at most once a second."""

import asyncio
import time

from peanut_serve.variants.roots import AdapterRoots

_SECONDS = 1.0


class Listing:
    """For one event loop.

    Args:
        roots: the folders.

    Attributes:
        latest: the names that were found last.
    """

    def __init__(self, roots: AdapterRoots) -> None:
        self.latest: list[str] = []
        self._roots = roots
        self._read_at: float | None = None
        self._reading = asyncio.Lock()

    async def names(self) -> list[str]:
        """Every name in the folders; those that ask while they are read share the result."""
        async with self._reading:
            if self._read_at is None or time.monotonic() - self._read_at > _SECONDS:
                self.latest = await asyncio.to_thread(self._roots.names)
                self._read_at = time.monotonic()
        return self.latest

    def renew(self) -> None:
        """Read the folders again when the names are asked for next."""
        self._read_at = None
