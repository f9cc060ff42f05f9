"""One engine, many variants: requests get the weights they name, in turn."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

from converters.errors import PeanutError
from peanut_serve.errors import EngineDownError
from peanut_serve.settings.swapping import SwapSettings
from peanut_serve.swapping import metrics
from peanut_serve.swapping.driver import SwapDriver
from peanut_serve.swapping.gate import Gate, Places, Ticket
from peanut_serve.swapping.policy import Policy
from peanut_serve.swapping.transaction import Engine, Swapper
from peanut_serve.variants.catalogue import Catalogue, Variant
from peanut_serve.variants.host_cache import BaseWeights, HostCache
from peanut_serve.variants.roots import AdapterRoots
from peanut_serve.variants.state_folder import VariantStore
from peanut_serve.variants.version import FitsLora, LoadedModel, VariantKind, Version

logger = logging.getLogger("vllm.peanut_serve")


@dataclass(frozen=True)
class Admitted:
    """A request that may run.

    Attributes:
        name: of the variant.
        version: what it is answered with.
    """

    name: str
    version: Version


@dataclass
class Usage:
    """Requests for a variant so far."""

    requests: int = 0
    last_used: float | None = None  # seconds since the epoch


class VariantServer:
    """Brings requests and weights together. For one event loop.

    Args:
        settings: what the operator wants.
        engine: with the base's weights.
        model: what it loads, see `try_out`.
        swapper: that of the engine.
        base_weights: W0, to go back to.
        base_names: what the base is called.
        roots: where variants are.
        store: what survives a restart.
        fits_lora: see `open_adapter`; None for never.
        on_active: told of the digest whenever the engine has other weights, before a request can use them.
    """

    def __init__(
        self,
        settings: SwapSettings,
        engine: Engine,
        model: LoadedModel,
        swapper: Swapper,
        base_weights: BaseWeights,
        base_names: Iterable[str],
        roots: AdapterRoots,
        store: VariantStore,
        fits_lora: FitsLora | None,
        on_active: Callable[[str], None] | None = None,
    ) -> None:
        self.base = swapper.active.version
        self.settings, self.swapper, self.roots = settings, swapper, roots
        self.usage: dict[str, Usage] = {}
        self.in_flight: Counter[str] = Counter()  # name -> requests that wait or run
        self._model, self._base_weights = model, base_weights
        self.cache = HostCache(settings.host_cache)
        self.catalogue = Catalogue(
            base_names, self.base, roots, store, model, settings.device, fits_lora, self._prepare
        )
        self.places = Places(settings.max_queue)
        self.gate = Gate(self.base.digest, lambda: self.driver.wake())
        self.driver = SwapDriver(
            engine, swapper, self.gate, self.cache, Policy(settings.max_wait, settings.min_dwell),
            settings.patience, self.catalogue.name_of, on_active or (lambda digest: None),
        )  # fmt: skip
        self._pinned: dict[str, str] = {}  # name -> digest
        self._driving: asyncio.Task[None] | None = None
        self._is_stopping = False

    async def start(self) -> None:
        """Evaluate what is to be there from the start, and serve from now on. Raises `PeanutError`."""
        asked = [*self.settings.preload, *self.settings.pin]
        remembered = [name for name, record in self.catalogue.records.variants.items() if record.pinned]
        for name in dict.fromkeys([*asked, *remembered]):
            try:
                await self.current(name)
            except PeanutError as error:
                if name in asked:
                    raise
                logger.error("variant=%s is pinned, and cannot be had: %s", name, error)
        self._driving = asyncio.create_task(self.driver.run())

    async def current(self, name: str) -> Version:
        """The version a name stands for, ready to be swapped to. Raises `UnknownVariantError`, `VariantError`."""
        variant, version = await self.catalogue.current(name)
        await self._prepare(version)
        self.follow_pin(variant, version)
        return version

    def follow_pin(self, variant: Variant, version: Version | None) -> None:
        """Pin the weights of the version that a pinned name stands for, and those only."""
        old = self._pinned.pop(variant.name, None)
        if variant.name in self.settings.pin or variant.record.pinned:
            digest = version.digest if version is not None else old
            if digest is not None:
                self._pinned[variant.name] = digest
                self.cache.pin(digest, True)
        if old is not None and old not in self._pinned.values():
            self.cache.pin(old, False)

    @asynccontextmanager
    async def serving(self, name: str, abort: Callable[[], None]) -> AsyncIterator[Admitted]:
        """Wait until a request may use the engine, with the weights of the variant it names.

        Args:
            name: what the request calls it.
            abort: ends the request while it runs.

        Raises `UnknownVariantError`, `VariantError`, `QueueFullError`, `EngineDownError`, `SwapError`.
        """
        arrival = time.monotonic()
        self._check_up()
        self.places.take(self.driver.retry_after)
        waiting = ExitStack()
        waiting.callback(self.places.give_back)
        with waiting:
            version = await self.current(name)
            self.in_flight[name] += 1
            try:
                with self.cache.holding(version.digest):
                    await self._prepare(version)  # it may have gone before it was held
                    ticket = Ticket(self._weights_of(version), arrival, abort)
                    self.driver.check(ticket.digest)
                    self.driver.notice_death()
                    await self.gate.enter(ticket)
                    waiting.close()
                    try:
                        self._note_use(name, arrival)
                        yield Admitted(name, version)
                    finally:
                        self.gate.leave(ticket)
            finally:
                self.in_flight[name] -= 1

    async def activate(self, name: str) -> None:
        """Give the engine the weights of a variant, next. Raises like `serving`, but for a full queue."""
        self._check_up()
        version = await self.current(name)
        digest = self._weights_of(version)
        self.driver.forgive(digest)
        with self.cache.holding(version.digest):
            await self._prepare(version)
            ticket = Ticket(digest, time.monotonic(), lambda: None)
            self.driver.want(digest, True)
            try:
                await self.gate.enter(ticket)
            finally:
                self.driver.want(digest, False)
            self.gate.leave(ticket)

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered, now or after a swap."""
        return self.driver.is_up and not self._is_stopping

    def stop(self) -> None:
        """Admit nobody any more; what runs goes on."""
        self._is_stopping = True
        self.gate.close()
        self.gate.refuse(None, EngineDownError("the server stops", 5))
        self.driver.stop()
        if self._driving is not None:
            self._driving.cancel()

    async def _prepare(self, version: Version) -> None:
        """Everything that can fail before the engine is touched."""
        if version.kind in (VariantKind.BASE, VariantKind.LORA):
            return
        start, known = time.perf_counter(), self.cache.get(version.digest)
        weights = await self.cache.load(version)
        with self.cache.holding(version.digest):
            await self._base_weights.prepare(self._model.with_neighbours(weights.tensors))
        self.driver.know(version)
        if known is None:
            metrics.EVALUATIONS.observe(time.perf_counter() - start)
            logger.info("digest=%s evaluated_seconds=%.2f", version.digest[:12], time.perf_counter() - start)
        metrics.HOST_CACHE.set(self.cache.nbytes)
        metrics.BASE_COPY.set(self._base_weights.nbytes)

    def _weights_of(self, version: Version) -> str:
        return self.base.digest if version.kind is VariantKind.LORA else version.digest

    def _check_up(self) -> None:
        if self._is_stopping:
            raise EngineDownError("the server stops", 5)
        self.driver.check_up()

    def _note_use(self, name: str, arrival: float) -> None:
        usage = self.usage.setdefault(name, Usage())
        usage.requests += 1
        usage.last_used = time.time()
        metrics.QUEUE_SECONDS.labels(name).observe(time.monotonic() - arrival)
