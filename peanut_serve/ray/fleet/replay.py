"""Brings the engine of a replica to what operators want, before its first request and whenever that changes.

A name that cannot be brought there is withheld: the replica answers requests for it with an error, rather than with
another version than its peers.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from peanut_serve.ray.fleet.wanted import Wanted, WantedState, WantedStore

logger = logging.getLogger("ray.serve")

_LOOK = 1.0  # seconds between two looks whether something else is wanted
_RETRY = 10.0  # seconds between two tries of what failed

Entry = dict[str, Any]
Call = Callable[[str, str, Any], Awaitable[Entry]]  # of the engine's admin API: method, path, body


class ThetaSource(Protocol):
    """Where θ of versions comes from that an engine does not have."""

    async def fetch(self, digest: str) -> bool:
        """Put θ of a version into the engine's state folder; False if nobody has it."""
        ...


class ChangeRefusedError(Exception):
    """The engine refused a change. Its argument is the reason."""


class Replay:
    """Follows what is wanted.

    Args:
        store: where it is kept.
        call: calls the engine's admin API.
        theta: where missing versions come from.

    Attributes:
        state: what the engine was brought to last.
        withheld: name -> why it could not be brought to what is wanted. Requests for it have to be refused.
        unpinned: name -> why it could not be pinned, or unpinned. Its answers are right.
    """

    def __init__(self, store: WantedStore, call: Call, theta: ThetaSource) -> None:
        self._store, self._call, self._theta = store, call, theta
        self.state = WantedState()
        self.withheld: dict[str, str] = {}
        self.unpinned: dict[str, str] = {}
        self._settling = asyncio.Lock()

    async def start(self) -> None:
        """Bring a new engine to what is wanted. Raises `EngineDownError`, `OptionError` if that is not known."""
        await self.follow(await self._store.newest())

    async def run(self) -> None:
        """Follow changes that this replica was not told of, and try again what failed, until cancelled."""
        loop = asyncio.get_running_loop()
        tried = loop.time()
        while True:
            await asyncio.sleep(_LOOK)
            try:
                newest = await self._store.newest()
                if newest.revision > self.state.revision:
                    await self.follow(newest)
                elif (self.withheld or self.unpinned) and loop.time() - tried > _RETRY:
                    tried = loop.time()
                    await self._settle([*self.withheld, *self.unpinned])
            except Exception as error:  # the next look may succeed; what is known stays in force
                logger.warning("what operators want is unknown: %s: %s", type(error).__name__, error)

    async def follow(self, newer: WantedState, done: bool = False) -> None:
        """Bring the engine to a newer state; with `done`, it was told of the last change and made it."""
        before, self.state = self.state, max(self.state, newer, key=lambda state: state.revision)
        changed = self.state.changed(before)
        if done and newer.revision == before.revision + 1:  # nothing is left to do for a name that was right before
            changed = [name for name in changed if name in self.withheld or name in self.unpinned]
        await self._settle(changed)  # if `run` was faster, this waits until it is done

    async def roll_back(self, name: str, digest: str) -> Entry:
        """Roll back to a version and hold it; θ comes from another replica if need be. The engine's answer."""
        path, body = f"{_path(name)}/rollback", {"digest": digest, "hold": True}
        entry = await self._call("POST", path, body)
        if entry["status"] == httpx.codes.UNPROCESSABLE_ENTITY and await self._theta.fetch(digest):
            entry = await self._call("POST", path, body)
        return entry

    async def _settle(self, names: Iterable[str]) -> None:
        left = dict.fromkeys(names)
        try:
            async with self._settling:
                for name in list(left):
                    wanted = self.state.variants[name]
                    await self._note(self.withheld, name, self._bring(name, wanted))
                    await self._note(self.unpinned, name, self._pin(name, wanted))
                    del left[name]
        except BaseException:
            # the state has them already: if they were not noted, nobody would try again
            for name in left:
                self.withheld.setdefault(name, "the change was interrupted")
            raise

    async def _note(self, failures: dict[str, str], name: str, attempt: Awaitable[None]) -> None:
        try:
            await attempt
            failures.pop(name, None)
        except ChangeRefusedError as refused:
            if failures.get(name) != str(refused):
                logger.warning("%s is not as operators want it: %s", name, refused)
            failures[name] = str(refused)

    async def _bring(self, name: str, wanted: Wanted) -> None:
        found = await self._look(name)
        is_other = found is not None and wanted.source not in (None, found["source"])
        if found is not None and (wanted.removed or is_other):
            await self._do("DELETE", f"{_path(name)}?drain=true")
            found = None
        if wanted.removed:
            return
        if found is None:
            if wanted.source is None:
                return  # its files are gone: the engine refuses requests for it
            found = await self._do("POST", "/variants", {"name": name, "source": wanted.source})
        if wanted.held is not None:
            if not found.get("held") or found["digest"] != wanted.held:
                self.withheld.setdefault(name, "it is being rolled back")  # from a version that nobody wants
                _checked(await self.roll_back(name, wanted.held))
        elif found.get("held"):
            await self._do("POST", f"{_path(name)}/reload")

    async def _pin(self, name: str, wanted: Wanted) -> None:
        if wanted.removed or wanted.pinned is None:
            return
        found = await self._look(name)
        if found is not None and found["pinned"] != wanted.pinned:
            await self._do("POST", f"{_path(name)}/{'pin' if wanted.pinned else 'unpin'}")

    async def _look(self, name: str) -> Entry | None:
        entry = await self._call("GET", _path(name), None)
        return None if entry["status"] == httpx.codes.NOT_FOUND else _checked(entry)

    async def _do(self, method: str, path: str, body: Any = None) -> Any:
        return _checked(await self._call(method, path, body))


def _checked(entry: Entry) -> Any:
    answer = entry.get("answer")
    if 200 <= entry["status"] < 300:
        return answer
    told = answer.get("error", {}).get("message") if isinstance(answer, dict) else None
    raise ChangeRefusedError(told or entry.get("error") or f"the engine answered {entry['status']}")


def _path(name: str) -> str:
    return "/variants/" + quote(name, safe="").replace(".", "%2E")
