"""Finds the version that a name stands for, and opens it, without blocking the event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from peanut_serve.classify.serving.library import Library
from peanut_serve.classify.serving.sessions import OpenTask, Sessions
from peanut_serve.classify.serving.version import TaskVersion
from peanut_serve.errors import BeingWrittenError, UnknownVariantError, shown

_T = TypeVar("_T")

_TRIES = 3  # of a version whose files are replaced while it is opened
_GAP = 0.5  # seconds in which the files of a known name may be away, between two renames
_LOOK = 0.05


class Finder:
    """Leases versions by name.

    Args:
        library: the names.
        sessions: what is open.
        looking: threads that read the state of files, and prepare inputs.
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
        found = await self._patiently(name, lambda: self._library.current(name))
        _check(found, digest)
        return found

    @asynccontextmanager
    async def lease(
        self, name: str, digest: str | None, begin: Callable[[OpenTask], _T]
    ) -> AsyncIterator[tuple[OpenTask, _T]]:
        """The current version of a name, open until the context ends, and what `begin` made with it.

        A version that is open is found in the same step as `begin` is called: going from the event loop to another
        thread and back takes longer than either.

        Args:
            name: of a task.
            digest: of the version that is wanted; None for the current one.
            begin: called in a thread.

        Raises what opening the version and `begin` raise.
        """
        for last in (False,) * (_TRIES - 1) + (True,):
            try:
                task, made = await self._begin(name, digest, begin)
                break
            except BeingWrittenError:
                if last:
                    raise
        try:
            yield task, made
        finally:
            self._sessions.release(task)

    async def _begin(self, name: str, digest: str | None, begin: Callable[[OpenTask], _T]) -> tuple[OpenTask, _T]:
        found = await self._patiently(name, lambda: self._begin_if_open(name, digest, begin))
        if isinstance(found, tuple):
            return found
        _check(found, digest)
        task = await self._leased(self._opening.submit(self._sessions.open, found))
        try:
            return task, await asyncio.get_running_loop().run_in_executor(self._looking, begin, task)
        except BaseException:
            self._sessions.release(task)
            raise

    def _begin_if_open(
        self, name: str, digest: str | None, begin: Callable[[OpenTask], _T]
    ) -> TaskVersion | tuple[OpenTask, _T]:
        """A lease of the current version, with what `begin` made. The version alone if it is not open, or another."""
        version = self._library.current(name)
        task = self._sessions.acquire(version) if digest in (None, version.digest) else None
        if task is None:
            return version
        try:
            return task, begin(task)
        except BaseException:
            self._sessions.release(task)
            raise

    async def _patiently(self, name: str, look: Callable[[], _T]) -> _T:
        """Call `look` in a thread. A name whose files are away is looked for again: it may be between two renames."""
        until = asyncio.get_running_loop().time() + _GAP
        while True:
            try:
                return await self._leased(self._looking.submit(look))
            except UnknownVariantError:
                if not self._library.is_known(name) or asyncio.get_running_loop().time() > until:
                    raise
                await asyncio.sleep(_LOOK)

    async def _leased(self, leasing: "Future[_T]") -> _T:
        """Await what may be a lease. A request that gives up meanwhile gives it back."""
        try:
            return await asyncio.wrap_future(leasing)
        except asyncio.CancelledError:
            leasing.add_done_callback(self._give_back)
            raise

    def _give_back(self, leasing: "Future[_T]") -> None:
        if leasing.cancelled() or leasing.exception() is not None:
            return
        found = leasing.result()
        task = found[0] if isinstance(found, tuple) else found
        if isinstance(task, OpenTask):
            self._sessions.release(task)


def _check(version: TaskVersion, digest: str | None) -> None:
    if digest not in (None, version.digest):
        raise UnknownVariantError(
            f"{version.name} is at version {version.digest}, not {shown(digest or '')}; its files were replaced"
        )
