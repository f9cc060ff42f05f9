"""The task that drives the engine: it decides on the next swap, performs it, and restarts a dead engine."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Literal

from peanut_serve.errors import EngineDownError, SwapError
from peanut_serve.settings.server import ServerSettings
from peanut_serve.swapping import metrics
from peanut_serve.swapping.ahead.staging import Staging
from peanut_serve.swapping.gate import Gate
from peanut_serve.swapping.history import Failures, Outcome, SwapHistory, SwapRecord, SwapUsage, outcome_of
from peanut_serve.swapping.policy import Policy, PriceEstimate, View, next_look, next_variant, reason_for
from peanut_serve.swapping.swappable import SwappableEngine
from peanut_serve.swapping.transaction import EngineDiedError, Loaded, Phase, Report
from peanut_serve.variants.host_cache import HostCache
from peanut_serve.variants.version import VariantKind, Version

logger = logging.getLogger("vllm.peanut_serve")

_LOOK_SECONDS = 0.25  # between checks that the engine is alive
_DEAD_DRAIN_SECONDS = 5.0  # for the requests of a dead engine to fail
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # between attempts to start an engine

State = Literal["serving", "swapping", "restarting", "failed"]


class SwapDriver:
    """Swaps weights and restarts the engine, one at a time, for as long as the server runs.

    Args:
        swappable: the engine, and the swapper of its weights.
        gate: holds requests until their weights are in the engine.
        cache: weights in host memory.
        settings: when to swap, and how long to wait for running requests.
        name_of: finds a name for a digest, for logs and metrics.
        on_active: called with the digest whenever the engine's weights change, before a request can use them.

    Attributes:
        state: of the engine.
        detail: reason for the state, if there is one.
        last_report: report of the last swap.
        usage: variant -> its swaps.
        history: the latest swaps and restarts.
        failed_starts: of the engine, since it ran last.
    """

    def __init__(
        self,
        swappable: SwappableEngine,
        gate: Gate,
        cache: HostCache,
        settings: ServerSettings,
        name_of: Callable[[str], str | None],
        on_active: Callable[[str], None],
    ) -> None:
        self.state: State = "serving"
        self.detail: str | None = None
        self.last_report = Report()
        self.usage: dict[str, SwapUsage] = {}
        self.history = SwapHistory(self._label)
        self.failed_starts = 0
        self._engine, self._swapper = swappable.engine, swappable.swapper
        self._gate, self._cache = gate, cache
        self._policy, self._drain_seconds = Policy(settings.max_wait, settings.min_dwell), settings.drain_seconds
        self._name_of, self._on_active = name_of, on_active
        self._base = self._swapper.active.version
        self._versions: dict[str, Version] = {self._base.digest: self._base}
        self._failures = Failures()
        self._requested: list[str] = []  # digests that operators are activating
        self._price = PriceEstimate()
        self._pause = _FIRST_PAUSE
        self._active_hold = ExitStack()
        self._staging = Staging(self._engine, self._swapper.changes, cache)
        self._is_stopping = False
        on_active(self._base.digest)

    def wake(self) -> None:
        """Make the driver decide now whether to swap."""
        self._gate.changed.set()

    def notice_death(self) -> None:
        """If the engine has died, stop admitting requests."""
        if self._engine.is_dead:
            self._gate.close()
            self.wake()

    def add_version(self, version: Version) -> None:
        """Make a version available to swap to; its weights are in host memory."""
        self._versions[version.digest] = version

    def check_engine(self) -> None:
        """Raise `EngineDownError` if there is no engine, and none is being started."""
        if self.state == "failed":
            raise EngineDownError(f"the engine is down: {self.detail}", round(self._pause))

    def check(self, digest: str) -> None:
        """Raise `SwapError` if the swap to a version has failed, and is not yet due for a retry."""
        if (left := self._failures.left(digest)) > 0:
            raise SwapError(
                f"{self._failures.of(digest)}; try again after {math.ceil(left)} s, or reload the variant"
            )

    def failure(self, digest: str | None) -> str | None:
        """Why the last swap to a version failed; None if it did not."""
        return self._failures.of(digest)

    def clear_failure(self, digest: str) -> None:
        """Forget that the swap to a version failed: the next request retries it."""
        self._failures.forget(digest)

    def request_swap(self, digest: str) -> None:
        """Swap to a version next, regardless of the policy, until `withdraw_swap` is called."""
        self._requested.append(digest)

    def withdraw_swap(self, digest: str) -> None:
        """Withdraw a `request_swap`."""
        self._requested.remove(digest)

    @property
    def is_up(self) -> bool:
        """Whether requests can be answered, now or after a swap."""
        return self.state in ("serving", "swapping") and not self._engine.is_dead

    @property
    def retry_after(self) -> int:
        """Seconds after which some of the waiting requests are expected to be admitted."""
        return max(1, math.ceil(self._price.seconds * len(self._gate.queues())))

    def stop(self) -> None:
        """Start nothing new. Cancelling the task is not enough: before Python 3.12, `wait_for` may lose it."""
        self._is_stopping = True
        self._staging.stop()

    async def run(self) -> None:
        """Run until stopped and cancelled."""
        while not self._is_stopping:
            try:
                await self._step()
            except Exception:
                logger.exception("internal error in peanut-serve; the weights in the engine are unknown")
                await self._restart_engine()

    async def _step(self) -> None:
        self._gate.changed.clear()
        queues = self._gate.queues()
        metrics.WAITING.set(sum(len(queue.arrivals) for queue in queues))
        metrics.READY.set(self.is_up)
        if self._engine.is_dead or self.state == "failed":
            await self._restart_engine()
            return
        active, view = self._swapper.active.version.digest, self._view()
        requested = (one for one in self._requested if one != active and self._failures.of(one) is None)
        if (target := next(requested, None)) is not None:
            await self._swap_to(self.history.begin(target, "operator", view, self._requested))
            return
        if (target := next_variant(view, self._policy)) != active:
            why = reason_for(target, view, self._policy)
            await self._swap_to(self.history.begin(target, why, view, self._requested))
            return
        self._staging.look(view, self._policy, self._versions)
        look = next_look(view, self._policy)
        pause = _LOOK_SECONDS if look is None else min(_LOOK_SECONDS, max(0.0, look - time.monotonic()))
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._gate.changed.wait(), pause)

    def _view(self) -> View:
        active, gate = self._swapper.active.version.digest, self._gate
        return View(time.monotonic(), active, gate.since, len(gate.running), gate.queues(), self._price.seconds)

    def _label(self, digest: str) -> str:
        return self._name_of(digest) or digest[:12]

    async def _swap_to(self, begun: SwapRecord) -> None:
        self.state = "swapping"
        digest, label, report = begun.digest, begun.target, Report()
        version = self._versions[digest]
        with self._cache.holding(digest):
            target = Loaded(version, self._cache.get(digest))
            start = time.perf_counter()
            try:
                if version.kind is not VariantKind.BASE and target.weights is None:
                    raise SwapError("the variant's weights are no longer in host memory")
                if self._gate.running:
                    self._staging.begin(target)  # while they end
                await self._swapper.swap(target, lambda: self._gate.drain(self._drain_seconds), report)
            except EngineDiedError as error:
                logger.error("%s; the requests for %s continue to wait", error, label)
                self.history.end(begun, report, error)
            except SwapError as error:
                self._record_failure(label, digest, error, outcome_of(report, error))
                self.history.end(begun, report, error)
                self._gate.refuse(digest, error)
            except EngineDownError as error:
                self.history.end(begun, report, error, is_down=True)
                self._gate.refuse(digest, error)
                await self._retry_later(error)
                return
            else:
                self._record_swap(label, report, time.perf_counter() - start)
                self.history.end(begun, report)
            self._open()

    def _record_failure(self, label: str, digest: str, error: SwapError, outcome: Outcome) -> None:
        self._failures.add(digest, error)
        counted = "cancelled" if outcome == "cancelled" else "failed"
        metrics.SWAPS.labels(self._name_of(digest) or "unknown", counted).inc()
        if counted == "failed":
            metrics.ROLLBACKS.inc()
        logger.error("swap variant=%s digest=%s outcome=%s error=%s", label, digest[:12], counted, error)

    def _record_swap(self, label: str, report: Report, seconds: float) -> None:
        active = self._swapper.active.version.digest
        self._failures.forget(active)
        self._staging.used(active)
        work = seconds - report.seconds[Phase.QUIESCE]
        self._price = self._price.after(work)
        self.last_report = report
        usage = self.usage.setdefault(label, SwapUsage())
        usage.swaps, usage.last_seconds = usage.swaps + 1, work
        metrics.SWAPS.labels(self._name_of(active) or "unknown", "done").inc()
        for phase, took in report.seconds.items():
            metrics.SWAP_SECONDS.labels(phase.value).observe(took)
        phases = " ".join(f"{phase.value}={took:.3f}" for phase, took in report.seconds.items())
        logger.info(
            "swap variant=%s digest=%s outcome=done tensors=%d bytes=%d %s",
            label, active[:12], report.tensors, report.nbytes, phases,
        )  # fmt: skip

    def _open(self) -> None:
        """Admit requests for the weights that the engine has now."""
        active = self._swapper.active.version.digest
        hold = ExitStack()
        hold.enter_context(self._cache.holding(active))  # a failed swap restores them
        self._active_hold.close()
        self._active_hold = hold
        self._on_active(active)
        self.state, self.detail, self._pause = "serving", None, _FIRST_PAUSE
        self.failed_starts = 0
        used = {active, self._base.digest, *(queue.digest for queue in self._gate.queues())}
        self._versions = {d: v for d, v in self._versions.items() if d in used or self._cache.get(d) is not None}
        self._gate.open(active)

    async def _restart_engine(self) -> None:
        """Restart the engine. Running requests have failed with vLLM's error; waiting ones continue to wait."""
        logger.error("the engine has died; restarting it")
        self.state, self.detail = "restarting", "the engine died and is being restarted"
        metrics.READY.set(0)
        begun = self.history.begin(self._base.digest, "engine_died", self._view())
        await self._gate.drain(_DEAD_DRAIN_SECONDS)
        try:
            report = await self._swapper.restart_engine()
        except EngineDownError as error:
            self.history.end(begun, Report(), error, is_down=True)
            await self._retry_later(error)
            return
        logger.warning(
            "the engine is running again after %.1f s, with the base's weights", report.seconds[Phase.RESTART]
        )
        self.history.end(begun, report)
        self._open()

    async def _retry_later(self, error: EngineDownError) -> None:
        """Reject all waiting requests, as there is no engine, and wait before the next attempt to start one."""
        self.state, self.detail = "failed", str(error)
        self.failed_starts += 1
        logger.error("no engine: %s", error)
        self._gate.close()
        self._gate.refuse(None, error)
        await asyncio.sleep(self._pause)
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
