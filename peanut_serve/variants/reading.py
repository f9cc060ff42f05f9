"""Reading versions: from files that have rested, or from the copies that the state folder keeps."""

import asyncio
import math
from dataclasses import dataclass
from pathlib import Path

from converters.errors import OptionError
from converters.serving import find_adapter
from peanut_serve.errors import BeingWrittenError, UnknownVariantError, VariantError
from peanut_serve.variants.opening import VersionOpener
from peanut_serve.variants.roots import AdapterRoots, State, VariantSource, looks_merged
from peanut_serve.variants.state_folder import VariantStore
from peanut_serve.variants.version import Version

_TRIES = 3


@dataclass(frozen=True, eq=False)
class VersionReader:
    """Reads versions of variants.

    Attributes:
        roots: where variants are looked up.
        store: the state folder, with copies of θ.
        opener: opens versions of the variants.
        settle: seconds that files must not have changed for before a new version is taken from them.
    """

    roots: AdapterRoots
    store: VariantStore
    opener: VersionOpener
    settle: float

    def look(self, name: str, entry: str) -> tuple[VariantSource, State]:
        """The source of a variant, an entry of the roots, and the state of its files.

        Raises `UnknownVariantError` if there are none, and `VariantError` if the entry is in two folders.
        """
        try:
            source = self.roots.find(entry)
        except OptionError as error:
            raise VariantError(str(error)) from None
        state = source.state() if source is not None else ()
        if source is None or not state:
            raise UnknownVariantError(f"the files of {name} were not found")
        return source, state

    async def read(self, name: str, source: VariantSource, state: State) -> tuple[Version, State]:
        """The version that is in the files, and the state that they have.

        Raises `BeingWrittenError` if they have just changed, or do so meanwhile, and what opening them raises.
        """
        state = await self._rested(name, source, state)
        for _ in range(_TRIES):
            version = await asyncio.to_thread(self._open, name, source)
            before, state = state, await asyncio.to_thread(source.state)
            if state == before:
                return version, state
        raise BeingWrittenError(f"the files of {name} are being written; try again when they are complete")

    def reopen(self, name: str, source: VariantSource, digest: str) -> Version | None:
        """Open an earlier version of a variant, if it is still available."""
        version = self.opener.reopen_adapter(name, digest, self.store)
        if version is None and isinstance(source.spec, Path) and looks_merged(source.spec):
            version = self.opener.checkpoint(name, source.spec)
        return version if version is not None and version.digest == digest else None

    async def _rested(self, name: str, source: VariantSource, state: State) -> State:
        """Wait until the files have rested, unless that takes longer than a request should wait."""
        left = await asyncio.to_thread(source.unsettled_seconds, self.settle)
        if left > self.settle:
            raise BeingWrittenError(
                f"the files of {name} end in zeros and have just changed, so they may be incomplete; try again in "
                f"{math.ceil(left)} s",
                math.ceil(left),
            )
        if left == 0:
            return state
        await asyncio.sleep(left)
        return await asyncio.to_thread(source.state)

    def _open(self, name: str, source: VariantSource) -> Version:
        spec = source.spec
        if isinstance(spec, Path) and looks_merged(spec):
            return self.opener.checkpoint(name, spec)
        path = spec if isinstance(spec, Path) else find_adapter(spec).path
        return self.opener.keep_adapter(name, path, self.store)
