"""A swap of the engine's weights as a transaction: either the new variant answers afterwards, or the old one does.

    idle ──quiesce──> drained ──apply──> applied ──invalidate──> clean ──check──> checked ──commit──> idle (new)
                         │                  │                      │                 │
                         └──────────────────┴───── a failure ──────┴─────────────────┘
                                                       │
                                         roll back: the old weights, whole ──> idle (old)
                                                       │ a failure, or a dead engine
                                         restart the engine: the base's weights ──> idle (base)

Everything that can fail on the host has happened before: weights are evaluated, checked and in host memory (see
`variant_versions.py` and `host_cache.py`). No request is in the engine from `quiesce` to the end.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NoReturn, Protocol

from converters.serving import TensorInfo
from peanut_serve.errors import EngineDownError, SwapError
from peanut_serve.swapping import metrics
from peanut_serve.swapping.canary import Canary
from peanut_serve.variants.host_weights import HostWeights
from peanut_serve.variants.version import LoadedModel, Version, places_of

logger = logging.getLogger("vllm.peanut_serve")


class EngineDiedError(SwapError):
    """The engine died before anything was applied, and was restarted: nothing speaks against the version."""


class Phase(str, Enum):
    """The parts of a swap, as they are measured."""

    QUIESCE = "quiesce"
    APPLY = "apply"
    INVALIDATE = "invalidate"
    CHECK = "check"
    ROLL_BACK = "roll_back"
    RESTART = "restart"


class Engine(Protocol):
    """What a swap needs of an engine. Every call raises an exception if it did not do what it says."""

    async def pause(self) -> None:
        """No request runs from now on; those that come wait."""

    async def resume(self) -> None:
        """Requests run again."""

    async def apply(self, places: Sequence[TensorInfo]) -> None:
        """Load tensors. A failure leaves the weights undefined."""

    async def invalidate(self) -> None:
        """Forget everything that was computed with other weights."""

    async def ask_canary(self) -> Canary:
        """The answer to a prompt that never changes."""

    async def restart(self) -> None:
        """Start anew, with the base's weights."""

    @property
    def is_dead(self) -> bool:
        """Whether it can only be restarted."""


@dataclass(frozen=True)
class Loaded:
    """A version with its tensors on the host; `weights` is None for the base, and for what runs on its weights."""

    version: Version
    weights: HostWeights | None = None

    @property
    def digests(self) -> Mapping[str, str]:
        """xxh3_128 of the tensors that are not the base's."""
        return self.weights.digests if self.weights is not None else {}


@dataclass
class Report:
    """How a swap went.

    Attributes:
        seconds: of each phase.
        tensors: how many were applied.
        nbytes: their size.
    """

    seconds: dict[Phase, float] = field(default_factory=dict)
    tensors: int = 0
    nbytes: int = 0

    @contextmanager
    def timing(self, phase: Phase) -> Iterator[None]:
        """Measure a phase, also one that fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Swapper:
    """Changes what an engine computes with. One call at a time.

    Args:
        engine: the engine; it has the base's weights.
        model: what it loads.
        base_places: where tensors of the base are to be read, by name.
        base: the base.
        canary: the base's answer to the canary.

    Attributes:
        active: what the engine computes with.
        restarts: how often the engine was started anew.
    """

    def __init__(
        self, engine: Engine, model: LoadedModel, base_places: Mapping[str, TensorInfo], base: Version, canary: Canary
    ) -> None:
        self._engine, self._model, self._base_places = engine, model, base_places
        self._base = self.active = Loaded(base)
        self._canaries = {base.digest: canary}
        self._tolerance = canary.tolerance
        self.restarts = 0

    def changes(self, target: Loaded) -> list[TensorInfo]:
        """What has to be loaded to get from the active version to another: what differs, with its neighbours."""
        old, new = self.active.digests, target.digests
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return list(places_of(self._model.with_neighbours(names), target.weights, self._base_places))

    async def swap(self, target: Loaded, quiesce: Callable[[], Awaitable[None]]) -> Report:
        """Make the engine compute with `target`.

        Args:
            target: with its weights on the host, and all of the base's that will be needed.
            quiesce: returns when no request is in the engine.

        Raises `SwapError`: it failed, and the engine computes with what it did before, or with the base after a
        restart (see `active`); `EngineDiedError` if the version has no part in that. Raises `EngineDownError`: not
        even that was possible.
        """
        report, places = Report(), self.changes(target)
        report.tensors, report.nbytes = len(places), sum(place.nbytes for place in places)
        try:
            with report.timing(Phase.QUIESCE):
                await quiesce()
                await self._engine.pause()
        except Exception as error:
            await self._stay(error, report)
        try:
            await self._load(places, target, report)
        except Exception as error:
            await self._roll_back(target, error, report)
        self.active = target
        return report

    async def heal(self) -> Report:
        """Restart an engine that has died; it computes with the base afterwards. Raises `EngineDownError`."""
        report = Report()
        with report.timing(Phase.RESTART):
            self.active = self._base
            try:
                self.restarts += 1
                metrics.RESTARTS.inc()
                await self._engine.restart()
                await self._check(self._base)
            except Exception as error:
                raise EngineDownError(f"the engine died, and starting it again failed: {error}") from error
        return report

    async def _load(self, places: Sequence[TensorInfo], target: Loaded, report: Report) -> None:
        with report.timing(Phase.APPLY):
            if places:
                await self._engine.apply(places)
        with report.timing(Phase.INVALIDATE):
            await self._engine.invalidate()
        with report.timing(Phase.CHECK):
            await self._engine.resume()  # for the canary; clients are held back elsewhere
            await self._check(target)

    async def _check(self, target: Loaded) -> None:
        """Hold the canary against what the version answered before; the first time, it has only to be sound."""
        found = replace(await self._engine.ask_canary(), tolerance=self._tolerance)
        known = self._canaries.get(target.version.digest, found)
        known.check(found)
        self._canaries[target.version.digest] = known

    async def _stay(self, error: Exception, report: Report) -> NoReturn:
        """Nothing was applied yet."""
        try:
            if self._engine.is_dead:
                raise EngineDownError("the engine has died")
            await self._engine.resume()
        except Exception as failure:
            logger.error("the engine does not go on, restarting it: %s", failure)
            report.seconds |= (await self.heal()).seconds
            raise EngineDiedError(f"the engine died before the swap, and was restarted: {error}") from error
        raise SwapError(f"the engine could not be stopped for the swap: {error}") from error

    async def _roll_back(self, target: Loaded, error: Exception, report: Report) -> NoReturn:
        old, new = self.active.version.digest[:12], target.version.digest[:12]
        logger.error("swap to %s failed, going back to %s: %s", new, old, error)
        try:
            with report.timing(Phase.ROLL_BACK):
                if self._engine.is_dead:
                    raise EngineDownError("the engine has died")
                await self._engine.pause()
                places = list(places_of(self._model.all(), self.active.weights, self._base_places))
                await self._load(places, self.active, report)
        except Exception as failure:
            logger.error("going back failed, restarting the engine: %s", failure)
            report.seconds |= (await self.heal()).seconds
            raise SwapError(
                f"the swap failed ({error}), and going back too ({failure}): the engine was restarted"
            ) from error
        raise SwapError(f"the swap failed and was rolled back: {error}") from error
