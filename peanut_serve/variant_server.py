"""One engine, many variants: requests get the weights they name, in turn."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from converters.errors import PeanutError
from peanut_serve import swap_metrics as metrics
from peanut_serve.adapter_roots import AdapterRoots
from peanut_serve.catalogue import Catalogue, Variant
from peanut_serve.gate import Gate, Places, Ticket
from peanut_serve.host_cache import BaseWeights, HostCache
from peanut_serve.scheduling import Policy, PriceEstimate, View, next_look, next_variant
from peanut_serve.self_test import LearningEngine
from peanut_serve.serving_errors import EngineDownError, SwapError
from peanut_serve.swap import EngineDiedError, Loaded, Phase, Report, Swapper
from peanut_serve.swap_settings import SwapSettings
from peanut_serve.variant_store import VariantStore
from peanut_serve.variant_versions import FitsLora, Kind, LoadedModel, Version

logger = logging.getLogger("vllm.peanut_serve")

_LOOK_SECONDS = 0.25  # between two looks at whether the engine lives
_RETRY_SECONDS = 30.0  # before a version whose swap has failed is tried again
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # between attempts to start an engine

State = Literal["serving", "swapping", "restarting", "failed"]


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
    """What happened to a variant so far."""

    requests: int = 0
    swaps: int = 0
    last_used: float | None = None
    last_swap_seconds: float | None = None


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
        engine: LearningEngine,
        model: LoadedModel,
        swapper: Swapper,
        base_weights: BaseWeights,
        base_names: Iterable[str],
        roots: AdapterRoots,
        store: VariantStore,
        fits_lora: FitsLora | None,
        on_active: Callable[[str], None] | None = None,
    ) -> None:
        base = swapper.active.version
        self.settings = settings
        self.state: State = "serving"
        self.detail: str | None = None
        self.last_report = Report()
        self.usage: dict[str, Usage] = {}
        self.in_flight: Counter[str] = Counter()  # name -> requests that wait or run
        self._engine, self._model, self._base_weights = engine, model, base_weights
        self.swapper, self.roots = swapper, roots
        self.base = base
        self.cache = HostCache(settings.host_cache)
        self.catalogue = Catalogue(base_names, base, roots, store, model, settings.device, fits_lora, self._prepare)
        self._on_active = on_active or (lambda digest: None)
        self._wake = asyncio.Event()
        self.gate = Gate(base.digest, self._wake.set)
        self.places = Places(settings.max_queue)
        self._policy = Policy(settings.max_wait, settings.min_dwell)
        self._price = PriceEstimate()
        self._versions: dict[str, Version] = {base.digest: base}
        self._failures: dict[str, tuple[float, SwapError]] = {}
        self._wanted: list[str] = []  # digests that an operator activates
        self._pinned: dict[str, str] = {}  # name -> digest
        self._active_hold = ExitStack()
        self._pause = _FIRST_PAUSE
        self._driver: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._on_active(base.digest)

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
        self._driver = asyncio.create_task(self._drive())

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
        self.places.take(self._retry_after())
        waiting = ExitStack()
        waiting.callback(self.places.give_back)
        with waiting:
            version = await self.current(name)
            self.in_flight[name] += 1
            try:
                with self.cache.holding(version.digest):
                    await self._prepare(version)  # it may have gone before it was held
                    ticket = Ticket(self._weights_of(version), arrival, abort)
                    self._check_failures(ticket.digest)
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
        self._failures.pop(digest, None)
        with self.cache.holding(version.digest):
            await self._prepare(version)
            ticket = Ticket(digest, time.monotonic(), lambda: None)
            self._wanted.append(digest)
            try:
                await self.gate.enter(ticket)
            finally:
                self._wanted.remove(digest)
            self.gate.leave(ticket)

    def failure(self, digest: str | None) -> str | None:
        """Why the last swap to a version failed."""
        return str(self._failures[digest][1]) if digest in self._failures else None

    def forgive(self, digest: str) -> None:
        """Try a version again whose swap has failed."""
        self._failures.pop(digest, None)

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered, now or after a swap."""
        return self.state in ("serving", "swapping") and not self._engine.is_dead and not self._is_stopping

    def stop(self) -> None:
        """Admit nobody any more; what runs goes on."""
        self._is_stopping = True
        self.gate.close()
        self.gate.refuse(None, EngineDownError("the server stops", 5))
        if self._driver is not None:
            self._driver.cancel()

    async def _prepare(self, version: Version) -> None:
        """Everything that can fail before the engine is touched."""
        if version.kind in (Kind.BASE, Kind.LORA):
            return
        start, known = time.perf_counter(), self.cache.get(version.digest)
        weights = await self.cache.load(version)
        with self.cache.holding(version.digest):
            await self._base_weights.prepare(self._model.with_neighbours(weights.tensors))
        self._versions[version.digest] = version
        if known is None:
            metrics.EVALUATIONS.observe(time.perf_counter() - start)
            logger.info("digest=%s evaluated_seconds=%.2f", version.digest[:12], time.perf_counter() - start)
        metrics.HOST_CACHE.set(self.cache.nbytes)
        metrics.BASE_COPY.set(self._base_weights.nbytes)

    def _weights_of(self, version: Version) -> str:
        return self.base.digest if version.kind is Kind.LORA else version.digest

    def _check_up(self) -> None:
        if self._is_stopping:
            raise EngineDownError("the server stops", 5)
        if self.state == "failed":
            raise EngineDownError(f"the engine is down: {self.detail}", round(_LONGEST_PAUSE))

    def _check_failures(self, digest: str) -> None:
        since, error = self._failures.get(digest, (-math.inf, None))
        if error is not None and time.monotonic() - since < _RETRY_SECONDS:
            raise SwapError(f"{error}; it is tried again after {_RETRY_SECONDS:.0f} s, or when it is reloaded")

    def _retry_after(self) -> int:
        return max(1, math.ceil(self._price.seconds * len(self.gate.queues())))

    def _note_use(self, name: str, arrival: float) -> None:
        usage = self.usage.setdefault(name, Usage())
        usage.requests += 1
        usage.last_used = time.time()
        metrics.QUEUE_SECONDS.labels(name).observe(time.monotonic() - arrival)

    async def _drive(self) -> None:
        """Swap and heal, one after the other, for as long as the server lives."""
        while True:
            try:
                await self._step()
            except Exception:
                logger.exception("a fault of peanut-serve; what the engine has is uncertain")
                await self._heal()

    async def _step(self) -> None:
        self._wake.clear()
        queues = self.gate.queues()
        metrics.WAITING.set(sum(len(queue.arrivals) for queue in queues))
        metrics.READY.set(self.is_ready)
        if self._engine.is_dead or self.state == "failed":
            await self._heal()
            return
        active = self.swapper.active.version.digest
        view = View(time.monotonic(), active, self.gate.since, len(self.gate.running), queues, self._price.seconds)
        operator = (d for d in self._wanted if d != active and d not in self._failures)
        wanted = next(operator, None) or next_variant(view, self._policy)
        if wanted != active:
            await self._swap_to(wanted)
            return
        look = next_look(view, self._policy)
        pause = _LOOK_SECONDS if look is None else min(_LOOK_SECONDS, max(0.0, look - time.monotonic()))
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), pause)

    async def _swap_to(self, digest: str) -> None:
        self.state = "swapping"
        version = self._versions[digest]
        label = self._label(digest)
        with self.cache.holding(digest):
            target = Loaded(version, self.cache.get(digest))
            start = time.perf_counter()
            try:
                if version.kind is not Kind.BASE and target.weights is None:
                    raise SwapError("its weights are not on the host any more")
                report = await self.swapper.swap(target, lambda: self.gate.drain(self.settings.patience))
            except EngineDiedError as error:
                logger.error("%s; the requests for %s go on waiting", error, label)
            except SwapError as error:
                self._failures[digest] = (time.monotonic(), error)
                metrics.SWAPS.labels(label, "failed").inc()
                metrics.ROLLBACKS.inc()
                logger.error("swap variant=%s digest=%s outcome=failed error=%s", label, digest[:12], error)
                self.gate.refuse(digest, error)
            except EngineDownError as error:
                self.gate.refuse(digest, error)
                await self._wait_after(error)
                return
            else:
                self._failures.pop(digest, None)
                self._note_swap(label, report, time.perf_counter() - start)
            self._open()

    def _note_swap(self, label: str, report: Report, seconds: float) -> None:
        work = seconds - report.seconds[Phase.QUIESCE]
        self._price = self._price.after(work)
        self.last_report = report
        usage = self.usage.setdefault(label, Usage())
        usage.swaps, usage.last_swap_seconds = usage.swaps + 1, work
        metrics.SWAPS.labels(label, "done").inc()
        for phase, took in report.seconds.items():
            metrics.SWAP_SECONDS.labels(phase.value).observe(took)
        phases = " ".join(f"{phase.value}={took:.3f}" for phase, took in report.seconds.items())
        logger.info(
            "swap variant=%s digest=%s outcome=done tensors=%d bytes=%d %s",
            label, self.swapper.active.version.digest[:12], report.tensors, report.nbytes, phases,
        )  # fmt: skip

    def _open(self) -> None:
        """Let requests for what the engine has now in."""
        active = self.swapper.active.version.digest
        hold = ExitStack()
        hold.enter_context(self.cache.holding(active))  # to roll back to
        self._active_hold.close()
        self._active_hold = hold
        self._on_active(active)
        self.state, self.detail, self._pause = "serving", None, _FIRST_PAUSE
        used = {active, self.base.digest, *(queue.digest for queue in self.gate.queues())}
        self._versions = {d: v for d, v in self._versions.items() if d in used or self.cache.get(d) is not None}
        self.gate.open(active)

    async def _heal(self) -> None:
        """Start the engine again. Those that ran have got vLLM's error; those that wait go on waiting."""
        logger.error("the engine has died; starting it again")
        self.state, self.detail = "restarting", "the engine died, and is started again"
        metrics.READY.set(0)
        await self.gate.drain(patience=5.0)
        try:
            report = await self.swapper.heal()
        except EngineDownError as error:
            await self._wait_after(error)
            return
        logger.warning("the engine is up again after %.1f s, with the base's weights", report.seconds[Phase.RESTART])
        self._open()

    async def _wait_after(self, error: EngineDownError) -> None:
        """No engine: tell everybody, and try again later."""
        self.state, self.detail = "failed", str(error)
        logger.error("no engine: %s", error)
        self.gate.close()
        self.gate.refuse(None, error)
        await asyncio.sleep(self._pause)
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause)

    def _label(self, digest: str) -> str:
        """A name that stands for a digest."""
        return self.catalogue.name_of(digest) or digest[:12]
