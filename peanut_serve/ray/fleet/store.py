"""Where what operators want of all replicas is remembered for those that start later.

It is in Ray's key-value store, which lives as long as Serve's own knowledge of the fleet, and in a file of each node,
from which the next cluster gets it. Of several states, the one with the highest revision counts, and of two with the
same one, that in Ray's store.

Ray's store has each state under a number of its own, which is taken once: whoever finds the next number taken looks
at that state first, so that of two changes at the same time none is lost, whichever processes make them.
"""

import asyncio
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray.exceptions import RayError
from ray.experimental import internal_kv

from converters.errors import OptionError
from peanut_serve.errors import EngineDownError
from peanut_serve.ray.fleet.wanted import WantedState

logger = logging.getLogger("ray.serve")

_NAMESPACE = "peanut-serve"
_PATIENCE = 30.0  # seconds for an answer of Ray's store
_TRIES = 20  # to take the next number
_KEPT = 8  # numbers below the latest that stay taken

Change = Callable[[WantedState], WantedState]


class WantedStore:
    """Where a fleet's `WantedState` is kept.

    Args:
        application: name of the Serve application.
        base: what the engines were told as `--base`: with another base, another state counts.
        folder: of this node; None to use Ray's store only.
    """

    def __init__(self, application: str, base: str, folder: Path | None) -> None:
        identity = hashlib.sha256(base.encode()).hexdigest()[:16]
        self._key = f"{application}:wanted:{identity}"
        self._file = folder / f"wanted-{identity}.json" if folder else None

    async def newest(self) -> WantedState:
        """The newest state; whichever place has an older one gets it, too.

        Raises `EngineDownError` if Ray does not answer, and `OptionError` if the file is damaged.
        """
        newest = await self._change(lambda state: state)
        known = self._read_file()
        if known.revision <= newest.revision and known != newest:
            self._write_file(newest)
        return newest

    async def change(self, change: Change) -> WantedState:
        """Remember a change. Raises as `newest`, and what the change raises, of which nothing is remembered then.

        Args:
            change: gives the state after another; called again if that one has changed meanwhile.
        """
        return await self._change(change)

    async def _change(self, change: Change) -> WantedState:
        for _ in range(_TRIES):
            number, there = await self._get()
            state = change(max(there, self._read_file(), key=lambda one: one.revision))
            if state.revision == there.revision or await self._put(number + 1, state):
                return state
        raise EngineDownError("what is wanted is being changed by others all the time; try again", 1)

    async def _get(self) -> tuple[int, WantedState]:
        """The latest number, 0 before there is one, and its state."""
        for _ in range(_TRIES):
            if not (number := max(await self._numbers(), default=0)):
                return 0, WantedState()
            found = await _in_time(internal_kv._internal_kv_get, self._name(number))
            if found:
                return number, WantedState.model_validate_json(found)
        raise EngineDownError("what is wanted is being changed by others all the time; try again", 1)

    async def _put(self, number: int, state: WantedState) -> bool:
        """Take a number for a state; False if it is not the next one any more."""
        is_taken = await _in_time(internal_kv._internal_kv_put, self._name(number), state.model_dump_json(), False)
        if is_taken:
            return False
        numbers = await self._numbers()
        if max(numbers) > number + _KEPT:  # it was taken and dropped long ago, while this process stood still
            await _in_time(internal_kv._internal_kv_del, self._name(number))
            return False
        for old in (one for one in numbers if one < number - _KEPT):
            await _in_time(internal_kv._internal_kv_del, self._name(old))
        return True

    async def _numbers(self) -> list[int]:
        names = await _in_time(internal_kv._internal_kv_list, f"{self._key}:")
        return [int(name.rpartition(b":")[2]) for name in names]

    def _name(self, number: int) -> str:
        return f"{self._key}:{number}"

    def _read_file(self) -> WantedState:
        if self._file is None or not self._file.exists():
            return WantedState()
        try:
            return WantedState.model_validate_json(self._file.read_bytes())
        except (OSError, ValidationError) as error:
            reason = " ".join(str(error).split())
            raise OptionError(
                f"{self._file} is damaged ({reason}); remove it to start without what operators changed before"
            ) from None

    def _write_file(self, state: WantedState) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._file.parent, prefix=".wanted-")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(state.model_dump_json(indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self._file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


async def _in_time(call: Any, *arguments: Any) -> Any:
    try:
        async with asyncio.timeout(_PATIENCE):
            return await asyncio.to_thread(lambda: call(*arguments, namespace=_NAMESPACE))
    except (TimeoutError, RayError, RuntimeError, OSError) as error:
        raise EngineDownError(f"Ray's store does not answer ({type(error).__name__})", 5) from error
