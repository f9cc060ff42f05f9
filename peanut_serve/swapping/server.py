"""Serves many variants on one engine: each request waits until the engine has the weights of the variant it names."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from itertools import count

from converters.errors import PeanutError
from peanut_serve.errors import EngineDownError, UnknownVariantError, VariantInUseError, shown
from peanut_serve.lora.cache import LoraCache
from peanut_serve.lora.folders import LoraFolders
from peanut_serve.lora.slots import AdapterSlots, LoraSlots
from peanut_serve.settings.server import AUTO_RESIDENT, ServerSettings
from peanut_serve.signals.tracing import annotate, span
from peanut_serve.swapping import metrics
from peanut_serve.swapping.adaptive.choosing import ResidentChooser
from peanut_serve.swapping.adaptive.demand import DemandMeter
from peanut_serve.swapping.adaptive.gathering import Gathering
from peanut_serve.swapping.adaptive.residents import Residents
from peanut_serve.swapping.ahead.recent import RecentVariants
from peanut_serve.swapping.driver import SwapDriver
from peanut_serve.swapping.gate import ABORT_SECONDS, Gate, Places, Ticket
from peanut_serve.swapping.host_side import HostSide, Preparation
from peanut_serve.swapping.observing import ObservedServer
from peanut_serve.swapping.requests import Admitted, Usage
from peanut_serve.swapping.swappable import SwappableEngine
from peanut_serve.tenants.usage import USAGE
from peanut_serve.variants.catalogue import Catalogue, Variant
from peanut_serve.variants.evaluations import Evaluations
from peanut_serve.variants.version import Version

logger = logging.getLogger("vllm.peanut_serve")

_POLL_SECONDS = 0.05

# told of each request that a version has answered or failed: its name, its digest if it is known, whether it failed
Watch = Callable[[str, str | None, bool], None]


class VariantServer(ObservedServer):
    """Serves requests with the weights of the variants they name. For one event loop; `assemble_server` builds it.

    Args:
        settings: the operator's choices.
        swappable: the engine; it has the base's weights.
        catalogue: the variants.
        on_active: called with the digest whenever the engine's weights change, before a request can use them.
        slots: for LoRA adapters in the engine.

    Attributes:
        watch: told how requests end.
    """

    def __init__(
        self,
        settings: ServerSettings,
        swappable: SwappableEngine,
        catalogue: Catalogue,
        on_active: Callable[[str], None],
        slots: LoraSlots = LoraSlots(),  # noqa: B008 - it is frozen
    ) -> None:
        self.settings, self.catalogue, self.swapper = settings, catalogue, swappable.swapper
        self.usage: dict[str, Usage] = {}
        # waiting and running requests; by the variant, as a name may come back while requests for the old one end
        self.in_flight: dict[Variant, set[Ticket]] = {}
        evaluations = Evaluations(settings.max_evaluations)
        self._host = HostSide(settings.host_cache, evaluations, swappable, self._give_way)
        self._engine = swappable.engine
        cache = LoraCache(settings.cache, settings.cache_bytes)
        starts, numbers = lambda: self.swapper.loads, count(1)
        load, evaluated = swappable.engine.load_lora, metrics.EVALUATIONS.observe
        self._lora = LoraFolders(cache, evaluations, load, starts, evaluated, numbers)
        own = Evaluations(settings.max_evaluations)  # complements take milliseconds, and do not wait for evaluations
        complements = LoraFolders(cache, own, load, starts, lambda seconds: None, numbers)
        self.residents = Residents(catalogue.base, self._lora, complements, cache, slots.max_rank)
        self.slots = AdapterSlots(slots.count, starts)
        self.cache = self._host.cache
        self.places = Places(settings.max_queue)
        gathering = Gathering(settings.gather / 1000, slots.seats)
        self.gate = Gate(catalogue.base.digest, gathering)
        self.driver = SwapDriver(swappable, self.gate, self.cache, self.residents, settings, self._name_of, on_active)
        self._preparation = Preparation(catalogue, self._host, self._lora, settings.pin, self.driver.add_version)
        self.demand = DemandMeter()
        self.chooser = ResidentChooser(
            settings, self.residents, self.driver, self._host, self._preparation, self.demand, gathering
        )
        self._listed: set[str] = set()
        self.watch: Watch = lambda name, digest, is_failure: None
        self._recent = RecentVariants(catalogue, self._preparation, self.cache, self.usage, lambda: self._is_idle)
        self._driving: asyncio.Task[None] | None = None
        self._preparing_ahead: asyncio.Task[None] | None = None
        self._choosing: asyncio.Task[None] | None = None
        self._is_stopping = False

    async def start(self) -> None:
        """Evaluate the preloaded and pinned variants, and start serving. Raises `PeanutError` if that fails."""
        await self.names()  # a message about an unknown name lists those that are known
        requested = [*self.settings.preload, *self.settings.pin]
        if self.settings.resident not in (None, AUTO_RESIDENT):
            requested.append(str(self.settings.resident))
        remembered = [name for name, record in self.catalogue.records.variants.items() if record.pinned]
        for name in dict.fromkeys([*requested, *remembered]):
            try:
                await self.prepare(name)
            except PeanutError as error:
                if name in requested:
                    raise
                logger.error("variant=%s is pinned, but cannot be prepared: %s", name, error)
        if self.settings.resident == AUTO_RESIDENT:
            names = [name for name in await self.names() if name not in self.catalogue.bases]
            await self.chooser.measure(names, self._engine, self._lora)
        self._driving = asyncio.create_task(self.driver.run())
        if self.settings.mode != "lora":
            self._preparing_ahead = asyncio.create_task(self._recent.run())
        if self.settings.resident is not None:
            self._choosing = asyncio.create_task(self.chooser.run())

    def stop(self) -> None:
        """Admit no more requests; running ones continue."""
        self._is_stopping = True
        metrics.READY.set(0)
        self.gate.close()
        self.gate.refuse(None, EngineDownError("the server is stopping", 5))
        self.driver.stop()
        for task in (self._driving, self._choosing, self._preparing_ahead):
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

    def _forget(self, name: str) -> None:
        """Remove what was counted for a name that is no longer served."""
        metrics.forget(name)
        USAGE.forget_variant(name)
        self.usage.pop(name, None)
        self.driver.usage.pop(name, None)

    def has(self, name: str) -> bool:
        """Whether a request can use a name."""
        return self.catalogue.has(name)

    async def prepare(self, name: str) -> Version:
        """The current version of a variant, ready to be swapped to. Raises `UnknownVariantError`, `VariantError`."""
        with ExitStack() as holds:
            return await self._preparation.current(name, holds)

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
            ticket = self._ticket(name, version, arrival, abort)
            with self._counted(variant, ticket):
                self.driver.check(ticket.digest)
                self.driver.notice_death()
                await self.residents.prepare(name, version, self.gate.weights, holds)
                await self.gate.enter(ticket)
                waiting.close()
                try:
                    self._record_use(name, arrival)
                    if self._choosing is not None and not version.has_own_weights:
                        holds.enter_context(self.demand.serving(name, version))
                    # for the weights that the engine has now: they stay until this request has left the gate
                    lora = await self.residents.adapter(name, version, self.gate.weights, holds)
                    if lora is not None:
                        holds.enter_context(self.slots.using(version.digest))
                    yield Admitted(name, version, lambda: ticket in self.gate.running, lora, asked)
                finally:
                    self.gate.leave(ticket)

    def _give_way(self) -> None:
        """Let a resident that the engine does not have, and that no swap is loading, give its memory to others."""
        if self.driver.state == "serving":
            self.chooser.give_way(self.swapper.active.version.digest)

    def _ticket(self, name: str, version: Version, arrival: float, abort: Callable[[], None]) -> Ticket:
        weights, fits = self._weights_of(version), self.residents.fits(version)
        return Ticket(weights, arrival, abort, name, version.digest, fits)

    def _name_of(self, digest: str) -> str | None:
        """A name for weights, if there is one."""
        return self.catalogue.name_of(self.residents.identity(digest))

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

    def _weights_of(self, version: Version) -> str:
        return version.digest if version.has_own_weights else self.catalogue.base.digest

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being prepared, waits or runs."""
        return not (self.in_flight or self.places.taken or self._is_stopping) and self.driver.is_up

    def _check_engine(self) -> None:
        if self._is_stopping:
            raise EngineDownError("the server is stopping", 5)
        self.driver.check_engine()

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

    # operators

    async def activate(self, name: str) -> None:
        """Swap to a variant next. Raises the same errors as `serving`, except `QueueFullError`."""
        self._check_engine()
        with ExitStack() as holds:
            digest = self._weights_of(await self._preparation.current(name, holds))
            self.driver.clear_failure(digest)
            ticket = Ticket(digest, time.monotonic(), lambda: None, name)
            self.driver.request_swap(digest)
            try:
                await self.gate.enter(ticket)
            finally:
                self.driver.withdraw_swap(digest)
            self.gate.leave(ticket)

    def remember_active(self, name: str) -> None:
        """Record that this variant is to be activated after a restart of the server."""
        self.catalogue.remember_active(name)

    async def register(self, name: str, source: str) -> None:
        """Add a name for an entry of the folders of variants, or an allowed Hub id, and prepare it.

        Raises the same errors as `Catalogue.register` and `prepare`; the name is not added then.
        """
        self.catalogue.register(name, source)
        try:
            await self.prepare(name)
        except BaseException:
            self.catalogue.unregister(name)
            raise

    async def unregister(self, name: str, drain: bool) -> None:
        """Remove a variant; with `drain`, wait for its requests, which are aborted after `drain_timeout`.

        Raises `UnknownVariantError`, and `VariantInUseError` if it has requests and `drain` is not set.
        """
        variant = self.catalogue.find(name)
        if (count := len(self.in_flight.get(variant, ()))) and not drain:
            raise VariantInUseError(f"{name} has {count} requests; wait for them with drain=true")
        digest = variant.version.digest if variant.version is not None else None
        self.catalogue.unregister(name)  # new requests no longer find it
        if not await self._has_none_within(variant, self.settings.drain_timeout):
            self._abort_requests(variant)
            await self._has_none_within(variant, ABORT_SECONDS)
        if not self.has(name):  # it may have been added again
            self._forget(name)
        if digest is not None and self.catalogue.name_of(digest) is None:
            self.cache.drop(digest)

    async def _has_none_within(self, variant: Variant, seconds: float) -> bool:
        """Whether the last request for a variant ends within so many seconds."""
        until = time.monotonic() + seconds
        while variant in self.in_flight and time.monotonic() < until:
            await asyncio.sleep(_POLL_SECONDS)
        return variant not in self.in_flight

    def _abort_requests(self, variant: Variant) -> None:
        error = UnknownVariantError(f"{variant.name} was removed while the request waited")
        for ticket in list(self.in_flight[variant]):
            if ticket.admission.done():
                ticket.abort()
            else:
                ticket.admission.set_exception(error)

    async def reload(self, name: str) -> None:
        """Read the files of a variant again, and retry a failed swap. Raises the same errors as `prepare`."""
        with ExitStack() as holds:
            variant = await self.catalogue.reload(name, self._preparation.preparing(name, holds))
            if variant.version is not None:
                self.driver.clear_failure(variant.version.digest)
            self._preparation.update_pin(variant)

    async def rollback(self, name: str, digest: str | None, hold: bool = False) -> None:
        """Roll back to an earlier version; see `Catalogue.rollback`."""
        with ExitStack() as holds:
            variant = await self.catalogue.rollback(name, digest, self._preparation.preparing(name, holds), hold)
            self._preparation.update_pin(variant)

    async def make_ready(self, name: str, version: Version) -> None:
        """Evaluate a version that a name is to move to. Raises `PeanutError` if it cannot be served."""
        with ExitStack() as holds:
            await self._preparation.preparing(name, holds)(version)

    def update_pin(self, name: str) -> None:
        """Pin the weights of the version that a name has moved to, if it is pinned; unpin those of a removed name."""
        if self.has(name):
            self._preparation.update_pin(self.catalogue.find(name))
        else:
            self._host.update_pin(name, False, None)

    async def pin(self, name: str, pinned: bool) -> None:
        """Keep the weights of a variant in host memory, or no longer. Raises the same errors as `prepare`."""
        if pinned:
            await self.prepare(name)  # what cannot be prepared is not recorded as pinned
        variant = self.catalogue.pin(name, pinned)
        self._preparation.update_pin(variant)
