"""A swap of the engine's weights as a transaction: afterwards, the engine has the new weights or still the old ones.

    idle ──quiesce──> drained ──apply──> applied ──invalidate──> clean ──check──> checked ──commit──> idle (new)
                         │                  │                      │                 │
                         └──────────────────┴───── a failure ──────┴─────────────────┘
                                                       │
                                         roll back: all the old weights ──> idle (old)
                                                       │ a failure, or a dead engine
                                         restart the engine: the base's weights ──> idle (base)

Everything that can fail on the host has been done before: the weights are evaluated, checked and in host memory (see
`variants/version.py` and `variants/host_cache.py`). No request is in the engine from `quiesce` to the end.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NoReturn, Protocol

from peanut_serve.errors import EngineDownError, SwapError
from peanut_serve.lora.folders import LoraFolder
from peanut_serve.swapping import metrics
from peanut_serve.swapping.checks.canary import Canary
from peanut_serve.variants.host_weights import HostWeights
from peanut_serve.variants.on_device.places import Place
from peanut_serve.variants.version import LoadedModel, Version, places_of

logger = logging.getLogger("vllm.peanut_serve")


class EngineDiedError(SwapError):
    """The engine died before anything was applied, and was restarted: the version did not cause it."""


class Phase(str, Enum):
    """The phases of a swap; the duration of each is measured."""

    QUIESCE = "quiesce"
    APPLY = "apply"
    INVALIDATE = "invalidate"
    CHECK = "check"
    ROLL_BACK = "roll_back"
    RESTART = "restart"


class Engine(Protocol):
    """The engine's operations that a swap uses. Each raises an exception if it fails."""

    async def pause(self) -> None:
        """Run no requests from now on; new ones wait."""

    async def resume(self) -> None:
        """Run requests again."""

    async def apply(self, places: Sequence[Place], afresh: bool = False) -> None:
        """Load tensors; `afresh` without what was kept of earlier loads. After a failure, they are undefined."""

    async def stage(self, places: Sequence[Place]) -> None:
        """Prepare the workers for `apply` with these tensors, without a change of the weights."""

    async def load_lora(self, name: str, folder: LoraFolder) -> None:
        """Load a LoRA adapter, so that one that it cannot load is an error of one request."""

    async def invalidate(self) -> None:
        """Discard everything that was computed with other weights, such as the prefix cache."""

    async def ask_canary(self) -> Canary:
        """The answer to a fixed prompt."""

    async def restart(self) -> None:
        """Restart the engine, with the base's weights."""

    @property
    def is_dead(self) -> bool:
        """Whether the engine has died; it can only be restarted then."""


@dataclass(frozen=True)
class Loaded:
    """A version with its tensors in host memory; `weights` is None if it runs on the base's weights."""

    version: Version
    weights: HostWeights | None = None

    @property
    def digests(self) -> Mapping[str, str]:
        """xxh3_128 of the tensors that differ from the base's."""
        return self.weights.digests if self.weights is not None else {}


@dataclass
class Report:
    """Measurements of a swap.

    Attributes:
        seconds: duration of each phase.
        times: when each phase began and ended, in seconds since the epoch; a phase may come twice.
        tensors: number of tensors that were loaded.
        nbytes: bytes that were sent to the workers for them.
    """

    seconds: dict[Phase, float] = field(default_factory=dict)
    times: list[tuple[Phase, float, float]] = field(default_factory=list)
    tensors: int = 0
    nbytes: int = 0

    @contextmanager
    def timing(self, phase: Phase) -> Iterator[None]:
        """Measure the duration of a phase, even if it fails."""
        start, began = time.perf_counter(), time.time()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + took
            self.times.append((phase, began, began + took))

    def include(self, other: "Report") -> None:
        """Add the phases of another one."""
        self.seconds |= other.seconds
        self.times += other.times


class Swapper:
    """Swaps the weights of an engine. One call at a time.

    Args:
        engine: the engine; it has the base's weights.
        model: the tensors that it loads.
        base_places: where workers get each tensor of the base, by name.
        base: the base's version.
        canary: the canary's answer with the base's weights.

    Attributes:
        active: the version whose weights the engine has.
        restarts: number of times the engine was restarted.
    """

    def __init__(
        self, engine: Engine, model: LoadedModel, base_places: Mapping[str, Place], base: Version, canary: Canary
    ) -> None:
        self._engine, self._model, self._base_places = engine, model, base_places
        self._base = self.active = Loaded(base)
        self._canaries = {base.digest: canary}
        self._tolerance = canary.tolerance
        self.restarts = 0

    def changes(self, target: Loaded) -> list[Place]:
        """Tensors to load to change from the active version to another: those that differ, with their neighbours."""
        old, new = self.active.digests, target.digests
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return list(places_of(self._model.with_neighbours(names), target.weights, self._base_places))

    async def swap(
        self, target: Loaded, quiesce: Callable[[], Awaitable[None]], report: Report | None = None
    ) -> Report:
        """Swap the engine's weights to those of `target`.

        Args:
            target: its weights, and those of the base that the swap needs, are in host memory.
            quiesce: returns when no request is in the engine.
            report: is filled in, so that a failure leaves its measurements too.

        Raises:
            SwapError: the swap failed. The engine has its previous weights, or the base's after a restart; see
                `active`.
            EngineDiedError: the engine was restarted, and the version did not cause it.
            EngineDownError: the engine could not be restarted.
        """
        report, places = report or Report(), self.changes(target)
        report.tensors, report.nbytes = len(places), sum(place.nbytes for place in places)
        try:
            with report.timing(Phase.QUIESCE):
                await quiesce()
                await self._engine.pause()
        except Exception as error:
            await self._cancel(error, report)
        try:
            await self._load(places, target, report)
        except Exception as error:
            await self._roll_back(target, error, report)
        self.active = target
        return report

    async def restart_engine(self) -> Report:
        """Restart an engine that has died; it has the base's weights afterwards. Raises `EngineDownError`."""
        report = Report()
        with report.timing(Phase.RESTART):
            self.active = self._base
            try:
                self.restarts += 1
                metrics.RESTARTS.inc()
                await self._engine.restart()
                await self._check(self._base)
            except Exception as error:
                raise EngineDownError(f"the engine died, and restarting it failed: {error}") from error
        return report

    async def _load(self, places: Sequence[Place], target: Loaded, report: Report, afresh: bool = False) -> None:
        with report.timing(Phase.APPLY):
            if places:
                await self._engine.apply(places, afresh)
        with report.timing(Phase.INVALIDATE):
            await self._engine.invalidate()
        with report.timing(Phase.CHECK):
            await self._engine.resume()  # for the canary; the gate still holds the clients' requests
            await self._check(target)

    async def _check(self, target: Loaded) -> None:
        """Compare the canary with the version's earlier answer; if there is none, only check that it is finite."""
        found = replace(await self._engine.ask_canary(), tolerance=self._tolerance)
        known = self._canaries.get(target.version.digest, found)
        known.check(found)
        self._canaries[target.version.digest] = known

    async def _cancel(self, error: Exception, report: Report) -> NoReturn:
        """Cancel a swap before any weights were loaded."""
        try:
            if self._engine.is_dead:
                raise EngineDownError("the engine has died")
            await self._engine.resume()
        except Exception as failure:
            logger.error("the engine cannot be resumed, restarting it: %s", failure)
            report.include(await self.restart_engine())
            raise EngineDiedError(f"the engine died before the swap, and was restarted: {error}") from error
        raise SwapError(f"the engine could not be paused for the swap: {error}") from error

    async def _roll_back(self, target: Loaded, error: Exception, report: Report) -> NoReturn:
        old, new = self.active.version.digest[:12], target.version.digest[:12]
        logger.error("swap to %s failed, rolling back to %s: %s", new, old, error)
        try:
            with report.timing(Phase.ROLL_BACK):
                if self._engine.is_dead:
                    raise EngineDownError("the engine has died")
                await self._engine.pause()
                places = list(places_of(self._model.all(), self.active.weights, self._base_places))
                await self._load(places, self.active, report, afresh=True)
        except Exception as failure:
            logger.error("rollback failed, restarting the engine: %s", failure)
            report.include(await self.restart_engine())
            raise SwapError(
                f"the swap failed ({error}), and so did the rollback ({failure}): the engine was restarted"
            ) from error
        raise SwapError(f"the swap failed and was rolled back: {error}") from error
