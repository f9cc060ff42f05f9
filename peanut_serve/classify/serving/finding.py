"""Finds the version that a name stands for, and opens it, without blocking the event loop."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from peanut_serve.classify.serving.library import Library
from peanut_serve.classify.serving.sessions import OpenTask, Sessions
from peanut_serve.classify.serving.version import TaskVersion
from peanut_serve.errors import BeingWrittenError, UnknownVariantError, shown

_TRIES = 3  # of a version whose files are replaced while it is opened
_GAP = 0.5  # seconds in which the files of a known name may be away, between two renames
_LOOK = 0.05


class Finder:
    """Leases versions by name.

    Args:
        library: the names.
        sessions: what is open.
        looking: threads that read the state of files.
    """

    def __init__(self, library: Library, sessions: Sessions, looking: ThreadPoolExecutor) -> None:
        self._library, self._sessions, self._looking = library, sessions, looking
        self._opening = ThreadPoolExecutor(1, "open")

    def close(self) -> None:
        """End the thread that opens versions."""
        self._opening.shutdown()

    async def version(self, name: str, digest: str | None = None) -> TaskVersion:
        """The version that a name stands for now, open or not.

        Raises the errors of `Library.current`, and `UnknownVariantError` if `digest` is given and is another.
        """
        found = await self._current(name)
        if digest is not None and found.digest != digest:
            raise UnknownVariantError(
                f"{name} is at version {found.digest}, not {shown(digest)}; its files were replaced"
            )
        return found

    @asynccontextmanager
    async def lease(self, name: str, digest: str | None) -> AsyncIterator[OpenTask]:
        """The current version of a name, open, until the context ends. Raises what opening it raises."""
        for last in (False,) * (_TRIES - 1) + (True,):
            version = await self.version(name, digest)
            try:
                task = self._sessions.acquire(version) or await self._open(version)
                break
            except BeingWrittenError:
                if last:
                    raise
        try:
            yield task
        finally:
            self._sessions.release(task)

    async def _open(self, version: TaskVersion) -> OpenTask:
        """Open a version beside the loop. A request that gives up meanwhile gives its lease back."""
        opening = self._opening.submit(self._sessions.open, version)
        try:
            return await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(
                lambda done: None if done.cancelled() or done.exception() else self._sessions.release(done.result())
            )
            raise

    async def _current(self, name: str) -> TaskVersion:
        """The version of a name. One whose files are away is looked for again: it may be between two renames."""
        until = asyncio.get_running_loop().time() + _GAP
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._looking, self._library.current, name)
            except UnknownVariantError:
                if not self._library.is_known(name) or asyncio.get_running_loop().time() > until:
                    raise
                await asyncio.sleep(_LOOK)
