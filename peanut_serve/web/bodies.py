"""The bodies of requests that are in memory: those of all clients have a limit together, beside that of each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peanut_serve.errors import BodiesFullError

LARGEST = 16  # as many bodies of the largest size may be in memory

Take = Callable[[int], None]


class Bodies:
    """Counts the bytes of bodies. For one event loop.

    Args:
        largest: size that one body may have.
    """

    def __init__(self, largest: int) -> None:
        self._most, self.taken = LARGEST * largest, 0

    @contextmanager
    def share(self) -> Iterator[Take]:
        """What one body takes, until it is not needed any more.

        Call what is yielded with the size of each part. It raises `BodiesFullError` if there is no room for it.
        """
        own = 0

        def take(size: int) -> None:
            nonlocal own
            own += size
            self.taken += size
            if self.taken > self._most:
                raise BodiesFullError("the bodies of other requests take all the memory that they may")

        try:
            yield take
        finally:
            self.taken -= own
