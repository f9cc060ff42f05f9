"""The LoRA adapters on disk that requests in flight use: each is evaluated once, and leased while it is needed."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from peanut_serve.errors import EngineDownError, VariantError
from peanut_serve.lora.cache import Lease, LoraCache
from peanut_serve.variants.evaluations import Evaluations
from peanut_serve.variants.lora_export import LoraExport
from peanut_serve.variants.version import Version

_TRIES = 3


@dataclass(frozen=True)
class LoraFolder:
    """A LoRA adapter that vLLM can load.

    Attributes:
        number: identifies the version while this server runs.
        path: the folder, whose name identifies the version.
    """

    number: int
    path: Path


# loads a LoRA adapter into the engine, so that one that vLLM cannot load is the error of one request
Load = Callable[[str, LoraFolder], Awaitable[None]]


class LoraFolders:
    """For one event loop.

    Args:
        cache: where the LoRA adapters are.
        evaluations: bounds the evaluations.
        load: loads an adapter into the engine. Called with its name, once per version and start of the engine.
        starts: number of times the engine was started again.
        evaluated: called with the seconds that each evaluation took.
    """

    def __init__(
        self,
        cache: LoraCache,
        evaluations: Evaluations,
        load: Load,
        starts: Callable[[], int],
        evaluated: Callable[[float], object],
    ) -> None:
        self._cache, self._evaluations, self._load, self._starts = cache, evaluations, load, starts
        self._evaluated = evaluated
        self._leases: dict[str, Lease] = {}
        self._holds: Counter[str] = Counter()
        self._numbers: dict[str, int] = {}
        self._loaded: dict[str, int] = {}  # digest -> the start of the engine that has loaded it
        self._opening: dict[str, asyncio.Lock] = {}

    async def prepare(self, name: str, version: Version, holds: ExitStack) -> None:
        """Evaluate a version if that is needed. It is kept on disk until `holds` is closed.

        Raises `QueueFullError`, and what its evaluation raises.
        """
        digest = version.digest
        if version.lora is None:
            raise VariantError(f"version {digest[:12]} of {name} cannot be served as LoRA")
        self._holds[digest] += 1
        holds.callback(self._release, digest)
        async with self._opening.setdefault(digest, asyncio.Lock()):
            if digest not in self._leases:
                self._leases[digest] = await self._lease(name, version.lora)

    async def load(self, name: str, version: Version) -> LoraFolder:
        """Load a version that was prepared and is held into the engine, if this start of it has not loaded it yet.

        Raises `VariantError` if vLLM cannot load it, and `EngineDownError` if the engine dies.
        """
        digest = version.digest
        number = self._numbers.setdefault(digest, len(self._numbers) + 1)
        folder = LoraFolder(number, self._leases[digest].folder)
        async with self._opening[digest]:
            if self._loaded.get(digest) != (start := self._starts()):
                await self._load_first(name, folder)
                self._loaded[digest] = start
        return folder

    async def _lease(self, name: str, export: LoraExport) -> Lease:
        async def evaluate() -> None:
            """Write the folder; it is leased by each of its users."""
            start = time.perf_counter()
            lease = await asyncio.to_thread(self._cache.get, export.key, export.write)
            lease.release()
            self._evaluated(time.perf_counter() - start)

        for _ in range(_TRIES):
            if (lease := await self._found(export.key)) is not None:
                return lease
            await self._evaluations.run(export.key, evaluate)
        raise VariantError(f"the LoRA adapter of {name} is removed as soon as it is written; raise --cache-size")

    async def _found(self, key: str) -> Lease | None:
        finding = asyncio.ensure_future(asyncio.to_thread(self._cache.find, key))
        try:
            return await asyncio.shield(finding)
        except asyncio.CancelledError:
            finding.add_done_callback(_drop)
            raise

    async def _load_first(self, name: str, folder: LoraFolder) -> None:
        try:
            await self._load(name, folder)
        except EngineDownError:
            raise
        except Exception as error:
            raise VariantError(f"vLLM cannot load the adapter {name}: {' '.join(str(error).split())}") from error

    def _release(self, digest: str) -> None:
        self._holds[digest] -= 1
        if self._holds[digest] > 0:
            return
        del self._holds[digest]
        self._opening.pop(digest, None)
        if (lease := self._leases.pop(digest, None)) is not None:
            lease.release()


def _drop(finding: "asyncio.Future[Lease | None]") -> None:
    if not finding.cancelled() and finding.exception() is None and (lease := finding.result()) is not None:
        lease.release()
