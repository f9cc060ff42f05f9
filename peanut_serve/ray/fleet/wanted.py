"""What operators want of all replicas, remembered for those that start later.

It is in Ray's key-value store, which lives as long as Serve's own knowledge of the fleet, and in a file of each node,
from which the next cluster gets it. Of several states, the one with the highest revision counts.
"""

import asyncio
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from ray.exceptions import RayError
from ray.experimental import internal_kv

from converters.errors import OptionError
from peanut_serve.errors import EngineDownError

logger = logging.getLogger("ray.serve")

_NAMESPACE = "peanut-serve"
_PATIENCE = 30.0  # seconds for an answer of Ray's store


class Wanted(BaseModel):
    """What is wanted of a name.

    Attributes:
        source: the entry that it was registered for; None if it is an entry of the folders itself.
        removed: it was unregistered.
        pinned: whether its weights are kept in host memory; None if nobody has said.
        held: digest of the version to which it was rolled back; None if it follows its files.
    """

    model_config = ConfigDict(frozen=True)

    source: str | None = None
    removed: bool = False
    pinned: bool | None = None
    held: str | None = None


class WantedState(BaseModel):
    """What is wanted of all names that operators have changed.

    Attributes:
        revision: raised by each change.
        variants: name -> what is wanted.
    """

    model_config = ConfigDict(frozen=True)

    revision: int = 0
    variants: Mapping[str, Wanted] = {}

    def after(self, action: str, name: str, given: str | None) -> "WantedState":
        """The state after a change.

        Args:
            action: the verb, as in `peanut-serve ctl`.
            name: of the variant.
            given: its source for `register`, the full digest for `rollback`.
        """
        old = self.variants.get(name, Wanted())
        new = {
            "register": Wanted(source=given),
            "unregister": Wanted(removed=True),
            "reload": old.model_copy(update={"held": None}),
            "rollback": old.model_copy(update={"held": given}),
            "pin": old.model_copy(update={"pinned": True}),
            "unpin": old.model_copy(update={"pinned": False}),
        }[action]
        return WantedState(revision=self.revision + 1, variants={**self.variants, name: new})

    def changed(self, since: "WantedState") -> list[str]:
        """The names of which something else is wanted than before."""
        return [name for name, wanted in self.variants.items() if since.variants.get(name) != wanted]


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
        here, there = self._read_file(), await self._get()
        newest = max(here, there, key=lambda state: state.revision)
        if there.revision < newest.revision:
            await self._put(newest)
        if here.revision < newest.revision:
            self._write_file(newest)
        return newest

    async def change(self, action: str, name: str, given: str | None) -> WantedState:
        """Remember a change; see `WantedState.after`. The caller makes one at a time. Raises as `newest`."""
        state = (await self.newest()).after(action, name, given)
        await self._put(state)
        return state

    async def _get(self) -> WantedState:
        found = await _in_time(internal_kv._internal_kv_get, self._key)
        return WantedState.model_validate_json(found) if found else WantedState()

    async def _put(self, state: WantedState) -> None:
        await _in_time(internal_kv._internal_kv_put, self._key, state.model_dump_json())

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


def base_of(options: Sequence[str]) -> str:
    """What a command line of `peanut-serve` says as `--base`."""
    for index, option in enumerate(options):
        if option == "--base" and index + 1 < len(options):
            return options[index + 1]
        if option.startswith("--base="):
            return option.removeprefix("--base=")
    return ""
