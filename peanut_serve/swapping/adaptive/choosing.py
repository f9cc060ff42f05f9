"""The task that decides who the resident is, and puts its weights where a swap takes them from."""

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import islice

from converters.errors import PeanutError
from peanut_serve.errors import UnknownVariantError
from peanut_serve.lora.folders import LoraFolders
from peanut_serve.settings.server import AUTO_RESIDENT, ServerSettings
from peanut_serve.settings.versions import STAGED, released_name
from peanut_serve.swapping import metrics
from peanut_serve.swapping.adaptive.demand import DemandMeter
from peanut_serve.swapping.adaptive.gathering import Gathering
from peanut_serve.swapping.adaptive.policy import Choice, Costs
from peanut_serve.swapping.adaptive.residents import Resident, Residents, Why
from peanut_serve.swapping.driver import SwapDriver
from peanut_serve.swapping.host_side import HostSide, Preparation
from peanut_serve.swapping.transaction import PROBES, Engine
from peanut_serve.variants.version import Version

logger = logging.getLogger("vllm.peanut_serve")

_LOOK_SECONDS = 1.0
_PAUSE_SECONDS = 60.0  # after a variant could not become the resident, before it may try again
_RECENT_SECONDS = 60.0  # for which a variant that was asked for must fit beside a new resident

# part of a step's time that is saved if no request in it has a LoRA adapter, until it is measured: that of a CPU
_SAVING = 0.35
_MOST_TRIED = 3  # variants, to measure it with one of them


class ResidentChooser:
    """For one event loop.

    Args:
        settings: the operator's choices: who the resident is, or that traffic decides.
        residents: are told who is wanted.
        driver: performs the change.
        host: evaluates merged weights.
        preparation: finds the current version of a variant, and prepares its LoRA adapter.
        demand: the traffic.
        gathering: how requests beside the resident are gathered.

    Attributes:
        choice: the state of the policy.
        saving: part of a step's time that is saved if no request in it has a LoRA adapter.
    """

    def __init__(
        self,
        settings: ServerSettings,
        residents: Residents,
        driver: SwapDriver,
        host: HostSide,
        preparation: Preparation,
        demand: DemandMeter,
        gathering: Gathering,
    ) -> None:
        self._fixed = None if settings.resident == AUTO_RESIDENT else settings.resident
        self._gathering = gathering
        self._residents, self._driver, self._host = residents, driver, host
        self._preparation, self._demand = preparation, demand
        self.choice, self.saving = Choice(residents.base.digest), _SAVING
        self._recent: dict[str, tuple[str, Version, float]] = {}  # digest -> name, version, when it was used last
        self._barred: dict[str, float] = {}  # name -> until when it is not tried again

    async def measure(self, names: Iterable[str], engine: Engine, lora: LoraFolders) -> None:
        """Measure what a step costs without LoRA and with it. Nothing else may run in the engine.

        Args:
            names: of variants; the first that is served as LoRA is used.
            engine: it has the weights of the base.
            lora: LoRA adapters of these.
        """
        for name in islice(names, _MOST_TRIED):
            try:
                with ExitStack() as holds:
                    version = await self._preparation.current(name, holds)
                    if version.lora is None:
                        continue
                    folder = await lora.load(name, version)
                    # the first of each warms up, as kernels may be compiled
                    found = [[await engine.step_seconds(name, folder, n) for n in (0, 1, PROBES)] for _ in range(3)]
            except PeanutError as error:
                logger.warning("a step cannot be measured with %s: %s", name, error)
                continue
            none, one, every = (min(column) for column in zip(*found[1:], strict=True))
            self.saving = max(0.0, 1.0 - none / every)
            logger.info(
                "a step of %d requests takes %.1f ms, with LoRA in one of them %.1f ms, in all %.1f ms: a resident "
                "saves up to %.0f %% of it", PROBES, none * 1e3, one * 1e3, every * 1e3, 100 * self.saving,
            )  # fmt: skip
            return
        logger.warning("no variant is served as LoRA yet: a resident is taken to save %.0f %%", 100 * self.saving)

    async def run(self) -> None:
        """Look at the traffic once a second, until cancelled."""
        while True:
            try:
                await self.look()
            except Exception:
                logger.exception("internal error in peanut-serve; the resident stays")
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Decide who the resident should be. If it is another one, prepare it, and have the driver change to it."""
        self._note_demand()
        wanted = self._residents.wanted
        if wanted is not None and (failure := self._driver.change_failure(wanted.merged.digest)) is not None:
            self._bar(wanted.name, failure)
            self._want(self._residents.in_engine, "failed")
        elif self._fixed is not None:
            await self._become(self._fixed, "fixed")
        elif wanted is not None and self.choice.resident == wanted.version.digest:
            await self._become(wanted.name, self._residents.why or "saves")  # its current version
        elif self.choice.resident != self._residents.base.digest:
            await self._become(self._recent[self.choice.resident][0], "saves")
        elif wanted is not None:
            self._want(None, "saves")

    def _note_demand(self) -> None:
        """Let the policy see the traffic since the last look."""
        now, used = time.monotonic(), self._demand.used
        self._recent |= {digest: (name, version, now) for digest, (name, version) in used.items()}
        self._recent = {digest: one for digest, one in self._recent.items() if now - one[2] < _RECENT_SECONDS}
        load, seconds = self._demand.look()
        wanted, base = self._residents.wanted, self._residents.base.digest
        before = self.choice.at(wanted.version.digest if wanted is not None else base)
        able = {base, *(d for d, (name, version, _) in self._recent.items() if self._is_able(name, version))}
        change = self._driver.change.seconds
        if not self._driver.change.measured:  # a guess, and the drain of what is asked for
            change += max((demand.running / demand.rate for demand in load.values() if demand.rate), default=0.0)
        costs = Costs(self.saving, change, self._gathering)
        self.choice = before.after(load, seconds, costs, able)
        metrics.RESIDENT_SAVED.inc(self.choice.saved - before.saved)

    def _is_able(self, name: str, version: Version) -> bool:
        is_barred = self._barred.get(name, 0.0) > time.monotonic()
        return not is_barred and version.merged is not None and self._refusal(name, version) is None

    def _refusal(self, name: str, version: Version) -> str | None:
        """Why a variant cannot be the resident; None if it can."""
        if version.lora is None:
            return "it is not served as LoRA, and is swapped in when it is asked for"
        if version.merged is None:
            return "its weights cannot be merged into the running model"
        resident = Resident(name, version, version.merged)
        others = [(other, own) for other, own, _ in self._recent.values() if not own.has_own_weights]
        for other, own in [("the base", self._residents.base), *others]:
            if (refusal := self._residents.refusal(own, resident)) is not None:
                return f"{other} has no complement beside it: {refusal}"
        return None

    async def _become(self, name: str, why: Why) -> None:
        """Have a variant become the resident, in its current version, unless it is already."""
        if self._barred.get(name, 0.0) > time.monotonic():
            return
        wanted, holds = self._residents.wanted, ExitStack()
        with ExitStack() as undone:
            undone.callback(holds.close)
            try:
                version = await self._preparation.current(name, holds)
                if wanted is not None and (wanted.name, wanted.version.digest) == (name, version.digest):
                    return
                refusal = self._refusal(name, version)
                if refusal is not None or version.merged is None:
                    self._bar(name, refusal)
                    return
                await self._host.prepare(version.merged, holds)
            except PeanutError as error:
                if wanted is not None and wanted.name == name and isinstance(error, UnknownVariantError):
                    await self._follow_gone(wanted, why)
                else:
                    self._bar(name, str(error))
                return
            undone.pop_all()
        self._driver.add_version(version.merged)
        self._driver.clear_change_failure(version.merged.digest)  # or `look` would take it for one of this attempt
        self._want(Resident(name, version, version.merged), why, holds)

    async def _follow_gone(self, gone: Resident, why: Why) -> None:
        """Have the name of its release become the resident in place of a staged version, if it can; or nobody."""
        if gone.name.endswith(STAGED):
            await self._become(released_name(gone.name), why)
        if self._residents.wanted is gone:
            self._want(None, "gone")

    def give_way(self, weights: str) -> None:
        """Release the weights of the resident if the engine has others, and keep them out for a while.

        Args:
            weights: digest of those that the engine has.
        """
        wanted = self._residents.wanted
        self._residents.give_way(weights)
        if wanted is not None and self._residents.wanted is not wanted:
            self._bar(wanted.name, "variants that are swapped in need its room in --host-cache, which is too small")

    def _want(self, resident: Resident | None, why: Why, holds: ExitStack | None = None) -> None:
        self._residents.want(resident, why, holds)
        self._driver.wake()

    def _bar(self, name: str, reason: str | None) -> None:
        logger.warning("%s cannot be the resident: %s; the next attempt is in %.0f s", name, reason, _PAUSE_SECONDS)
        self._barred[name] = time.monotonic() + _PAUSE_SECONDS
