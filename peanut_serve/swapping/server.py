"""Serves many variants on one engine: each request waits until the engine has the weights of the variant it names."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

from converters.errors import PeanutError
from peanut_serve.errors import EngineDownError, UnknownVariantError, shown
from peanut_serve.lora.cache import LoraCache
from peanut_serve.lora.folders import LoraFolders
from peanut_serve.lora.slots import AdapterSlots
from peanut_serve.settings.server import ServerSettings
from peanut_serve.signals.tracing import annotate, span
from peanut_serve.swapping import metrics
from peanut_serve.swapping.ahead.recent import RecentVariants
from peanut_serve.swapping.driver import SwapDriver
from peanut_serve.swapping.gate import Gate, Places, Ticket
from peanut_serve.swapping.host_side import HostSide, Preparation
from peanut_serve.swapping.operating import OperatedServer
from peanut_serve.swapping.requests import Admitted, Usage
from peanut_serve.swapping.swappable import SwappableEngine
from peanut_serve.variants.catalogue import Catalogue, Variant
from peanut_serve.variants.evaluations import Evaluations
from peanut_serve.variants.version import Version

logger = logging.getLogger("vllm.peanut_serve")

_POLL_SECONDS = 0.05

# told of each request that a version has answered or failed: its name, its digest if it is known, whether it failed
Watch = Callable[[str, str | None, bool], None]


class VariantServer(OperatedServer):
    """Serves requests with the weights of the variants they name. For one event loop; `assemble_server` builds it.

    Args:
        settings: the operator's choices.
        swappable: the engine; it has the base's weights.
        catalogue: the variants.
        on_active: called with the digest whenever the engine's weights change, before a request can use them.
        lora_slots: how many LoRA adapters the engine has at once.

    Attributes:
        watch: told how requests end.
    """

    def __init__(
        self,
        settings: ServerSettings,
        swappable: SwappableEngine,
        catalogue: Catalogue,
        on_active: Callable[[str], None],
        lora_slots: int = 0,
    ) -> None:
        self.settings, self.catalogue, self.swapper = settings, catalogue, swappable.swapper
        self.usage: dict[str, Usage] = {}
        self.in_flight = {}
        evaluations = Evaluations(settings.max_evaluations)
        self._host = HostSide(settings.host_cache, evaluations, swappable)
        cache = LoraCache(settings.cache, settings.cache_bytes)
        starts = lambda: self.swapper.restarts  # noqa: E731
        load, evaluated = swappable.engine.load_lora, metrics.EVALUATIONS.observe
        self._lora = LoraFolders(cache, evaluations, load, starts, evaluated)
        self.slots = AdapterSlots(lora_slots, starts)
        self.cache = self._host.cache
        self.places = Places(settings.max_queue)
        self.gate = Gate(catalogue.base.digest)
        self.driver = SwapDriver(swappable, self.gate, self.cache, settings, catalogue.name_of, on_active)
        self._preparation = Preparation(catalogue, self._host, self._lora, settings.pin, self.driver.add_version)
        self._listed: set[str] = set()
        self.watch: Watch = lambda name, digest, is_failure: None
        self._recent = RecentVariants(catalogue, self._preparation, self.cache, self.usage, lambda: self._is_idle)
        self._driving: asyncio.Task[None] | None = None
        self._preparing_ahead: asyncio.Task[None] | None = None
        self._is_stopping = False

    async def start(self) -> None:
        """Evaluate the preloaded and pinned variants, and start serving. Raises `PeanutError` if that fails."""
        await self.names()  # a message about an unknown name lists those that are known
        requested = [*self.settings.preload, *self.settings.pin]
        remembered = [name for name, record in self.catalogue.records.variants.items() if record.pinned]
        for name in dict.fromkeys([*requested, *remembered]):
            try:
                await self.prepare(name)
            except PeanutError as error:
                if name in requested:
                    raise
                logger.error("variant=%s is pinned, but cannot be prepared: %s", name, error)
        self._driving = asyncio.create_task(self.driver.run())
        if self.settings.mode != "lora":
            self._preparing_ahead = asyncio.create_task(self._recent.run())

    def stop(self) -> None:
        """Admit no more requests; running ones continue."""
        self._is_stopping = True
        metrics.READY.set(0)
        self.gate.close()
        self.gate.refuse(None, EngineDownError("the server is stopping", 5))
        self.driver.stop()
        for task in (self._driving, self._preparing_ahead):
            if task is not None:
                task.cancel()

    # requests

    async def names(self, missing: bool = False) -> list[str]:
        """Every name that a request can use, the base's first; see `Catalogue.names`."""
        found = await self.catalogue.names(missing)
        if not missing:
            self._forget_gone(set(found))
        return found

    def _forget_gone(self, found: set[str]) -> None:
        """Forget names that were listed and are not any more, or that were removed before their last request."""
        gone = (self._listed - found) | {name for name in self.usage.keys() - found if not self.has(name)}
        busy = {variant.name for variant in self.in_flight} & gone
        for name in gone - busy:
            self._forget(name)
        self._listed = found | busy

    async def observe(self) -> None:
        """Renew what the metrics tell of the engine, and end the series of names that are gone."""
        await self.names()
        metrics.STATE.residency = self.residency()

    @asynccontextmanager
    async def serving(
        self, name: str, abort: Callable[[], None], asked: str | None = None
    ) -> AsyncIterator[Admitted]:
        """Wait until a request may use the engine, with the weights of the variant it names.

        Args:
            name: of the variant.
            abort: ends the request while it runs.
            asked: the name in the request, if it is another one.

        Raises `UnknownVariantError`, `VariantError`, `QueueFullError`, `EngineDownError`, `SwapError`.
        """
        arrival = time.monotonic()
        self._check_engine()
        self.places.take(self.driver.retry_after)
        waiting = ExitStack()
        waiting.callback(self.places.give_back)
        with waiting, ExitStack() as holds:
            note = waiting.enter_context(span("peanut.queue", {"peanut.variant": name}))
            variant, version = await self._prepared(name, asked, holds)
            name = variant.name
            note({"peanut.digest": version.digest, "peanut.kind": version.kind.value})
            ticket = Ticket(self._weights_of(version), arrival, abort, name)
            with self._counted(variant, ticket):
                self.driver.check(ticket.digest)
                self.driver.notice_death()
                await self.gate.enter(ticket)
                waiting.close()
                try:
                    self._record_use(name, arrival)
                    lora = None
                    if version.lora is not None:
                        lora = await self._lora.load(name, version)
                        holds.enter_context(self.slots.using(version.digest))
                    yield Admitted(name, version, lambda: ticket in self.gate.running, lora, asked)
                finally:
                    self.gate.leave(ticket)

    @contextmanager
    def _counted(self, variant: Variant, ticket: Ticket) -> Iterator[None]:
        self.in_flight.setdefault(variant, set()).add(ticket)
        try:
            yield
        finally:
            self.in_flight[variant].discard(ticket)
            if not self.in_flight[variant]:
                del self.in_flight[variant]

    async def _prepared(self, name: str, asked: str | None, holds: ExitStack) -> tuple[Variant, Version]:
        try:
            variant = self.catalogue.find(name)
            return variant, await self._preparation.current(name, holds)
        except PeanutError as error:
            is_gone = isinstance(error, UnknownVariantError) or not self.has(name)
            if asked is None or asked == name or not is_gone:
                raise
        # the release has ended since the request came, or the files of its version were removed
        variant = self.catalogue.find(asked)
        return variant, await self._preparation.current(asked, holds)

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being prepared, waits or runs."""
        return not (self.in_flight or self.places.taken or self._is_stopping) and self.driver.is_up

    def _record_use(self, name: str, arrival: float) -> None:
        usage = self.usage.setdefault(name, Usage())
        usage.requests += 1
        usage.last_used = time.time()
        metrics.QUEUE_SECONDS.labels(name).observe(time.monotonic() - arrival)

    def record_end(
        self, name: str, outcome: str, seconds: float, digest: str | None = None, is_failure: bool = False
    ) -> None:
        """Count a request that ended, if its name is that of a variant.

        Args:
            name: of the variant.
            outcome: a status, or what happened instead.
            seconds: since its arrival.
            digest: of the version that it was admitted to.
            is_failure: whether that version, and not the request, may be the cause that it was not answered.
        """
        annotate({"peanut.variant": shown(name), "peanut.outcome": outcome})
        if self.has(name):
            self.usage.setdefault(name, Usage()).end(outcome, seconds)
        if is_failure or outcome.startswith("2"):
            self.watch(name, digest, is_failure)
