"""What the front of a fleet knows of releases: which version will answer a request, so where it goes best."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context

from peanut_serve.ray.fleet.store import WantedStore
from peanut_serve.ray.fleet.wanted import WantedState
from peanut_serve.settings.versions import CURRENT, staged_name
from peanut_serve.variants.release import Release

logger = logging.getLogger("ray.serve")

_LOOK = 1.0  # seconds between two looks

Watch = Callable[[WantedState], Awaitable[None]]


class ReleaseView:
    """The releases as they were a second ago. The engines decide; what is known here decides only which is asked.

    Args:
        store: where they are remembered.
        watch: awaited at each look while a release has a share.
    """

    def __init__(self, store: WantedStore, watch: Watch | None) -> None:
        self._store, self._watch = store, watch
        self._state = WantedState()
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look from now on, in the running loop; once is enough."""
        if self._looking is None or self._looking.done():
            # without the context of the request that is being answered, with which Serve would cancel it
            self._looking = asyncio.create_task(self._look(), context=Context())

    async def _look(self) -> None:
        while True:
            try:
                self._state = await self._store.newest()
                shares = [one.release.weight for one in self._state.variants.values() if one.release is not None]
                if self._watch is not None and any(shares):
                    await self._watch(self._state)
            except Exception as error:  # the next look may succeed
                logger.warning("the releases are unknown: %s: %s", type(error).__name__, error)
            await asyncio.sleep(_LOOK)

    def release(self, asked: str) -> Release | None:
        """The open release that concerns a request for a name."""
        return self._state.of(asked.removesuffix(CURRENT)).open_release

    def has_share(self, asked: str) -> bool:
        """Whether a request for a name may be answered by one of two versions."""
        release = self._state.of(asked).open_release
        return release is not None and release.weight > 0

    def answering(self, asked: str, session: str | None) -> str:
        """The name whose version will answer; see `Catalogue.answering`, which the engine decides by."""
        release = self.release(asked)
        if release is None:
            return asked
        name = asked.removesuffix(CURRENT)
        return staged_name(name) if asked == name and release.draws(session) else name
