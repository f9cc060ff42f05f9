"""Brings the engine of a replica to what operators want, before its first request and whenever that changes.

A name that cannot be brought there is withheld: the replica answers requests for it with an error, rather than with
another version than its peers. A staged version that is not there is withheld by itself, as NAME@staged.
"""

import asyncio
import logging
from collections.abc import Awaitable, Iterable
from functools import partial

from peanut_serve.ray.fleet.bringing import bring, bring_pin, bring_staged
from peanut_serve.ray.fleet.engine_admin import Call, ChangeRefusedError, EngineAdmin, Entry, ThetaSource
from peanut_serve.ray.fleet.store import WantedStore
from peanut_serve.ray.fleet.wanted import WantedState
from peanut_serve.settings.versions import released_name, staged_name

logger = logging.getLogger("ray.serve")

_LOOK = 1.0  # seconds between two looks whether something else is wanted
_RETRY = 10.0  # seconds between two tries of what failed
_UNTOLD = 10.0  # seconds after which nobody remembers what this replica did first


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
        self._store, self._engine = store, EngineAdmin(call, theta)
        self.state = WantedState()
        self.withheld: dict[str, str] = {}
        self.unpinned: dict[str, str] = {}
        self._settling = asyncio.Lock()
        self._first: dict[str, float] = {}  # name -> when something was done here that nobody wanted yet

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
                    await self.settle([*self.withheld, *self.unpinned])
                await self._undo(loop.time() - _UNTOLD)  # now it is known that nobody remembers it
            except Exception as error:  # the next look may succeed; what is known stays in force
                logger.warning("what operators want is unknown: %s: %s", type(error).__name__, error)

    async def follow(self, newer: WantedState, done: bool = False) -> None:
        """Bring the engine to a newer state; with `done`, it was told of the last change and made it."""
        before, self.state = self.state, max(self.state, newer, key=lambda state: state.revision)
        changed = self.state.changed(before)
        if done and newer.revision == before.revision + 1:  # nothing is left to do for a name that was right before
            changed = [name for name in changed if self.reason(name) is not None]
        await self.settle(changed)  # if `run` was faster, this waits until it is done

    def note_first(self, name: str) -> None:
        """Note that this replica did something first, for the others to follow once it is remembered.

        If it is not, as the store or the front has failed meanwhile, it is undone.
        """
        self._first[released_name(name)] = asyncio.get_running_loop().time()

    async def _undo(self, before: float) -> None:
        """Undo what this replica did first before a moment, and was not told to follow since."""
        for name in [name for name, at in self._first.items() if at < before]:
            logger.warning("%s is brought back to what operators want: its change was not remembered", name)
            await self.settle([name])

    def reason(self, name: str) -> str | None:
        """Why a name is not as it is wanted; None if it is."""
        return self.withheld.get(name) or self.withheld.get(staged_name(name)) or self.unpinned.get(name)

    async def roll_back(self, name: str, digest: str) -> Entry:
        """Roll back to a version and hold it; θ comes from another replica if need be. The engine's answer."""
        return await self._engine.roll_back(name, digest)

    async def settle(self, names: Iterable[str]) -> None:
        """Bring names to what is wanted of them, whatever the engine has."""
        left = dict.fromkeys(map(released_name, names))
        try:
            async with self._settling:
                for name in list(left):
                    self._first.pop(name, None)
                    wanted, staged = self.state.of(name), staged_name(name)
                    withhold = partial(self.withheld.setdefault, name)
                    await self._note(self.withheld, name, bring(self._engine, name, wanted, withhold))
                    await self._note(self.withheld, staged, bring_staged(self._engine, name, wanted))
                    await self._note(self.unpinned, name, bring_pin(self._engine, name, wanted))
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
