"""Releases of a fleet: what operators want of a new version, of all replicas and of those that start later.

A version is staged from files at one replica; the others, and later ones, stage the version with that digest. Each
asks its own canary set. Failures of the share are counted at each replica, and added up here.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from ray.serve.handle import DeploymentHandle

from converters.errors import PeanutError
from peanut_serve.errors import ReleaseError, UnknownVariantError, shown
from peanut_serve.ray.fleet.asking import Entry, ask_all
from peanut_serve.ray.fleet.changes import FleetChanges
from peanut_serve.ray.fleet.engine_admin import release_path
from peanut_serve.ray.fleet.joint_releases import check_everywhere, check_joint_passed, failure_of, joint_release
from peanut_serve.ray.fleet.store import Change, WantedStore
from peanut_serve.ray.fleet.wanted import Wanted, WantedState
from peanut_serve.releases.fleet_schema import FleetReleaseStatus
from peanut_serve.releases.rules import check_none_open, check_open, noted, too_many_failed
from peanut_serve.releases.schema import Promotion, Reason, ReleaseStatus, Staging, Weighing
from peanut_serve.variants.release import Release
from peanut_serve.web.audit import AuditLog, Caller
from peanut_serve.web.fleet_schema import FleetEntry
from peanut_serve.web.schema import VariantStatus

logger = logging.getLogger("ray.serve")

_LONGEST = 3600.0  # seconds; versions are evaluated, and canary sets asked
_GLANCE = 10.0  # seconds, for what is known already
_FRONT = Caller(None, "peanut-serve")  # what it does by itself

GIVEN: dict[str, type[BaseModel] | None] = {  # what each step takes
    "hold": None,
    "stage": Staging,
    "check": None,
    "weight": Weighing,
    "promote": Promotion,
    "rollback": Reason,
}


class ReplicaRefusedError(PeanutError):
    """The replica that was asked first refused; the others were not asked.

    Attributes:
        status: of its answer.
        kind: name of the error there.
    """

    def __init__(self, entry: Entry) -> None:
        told = FleetEntry.model_validate(entry)
        super().__init__(told.reason or f"the replica answered {told.status}")
        self.status = told.status
        error = told.answer.get("error") if isinstance(told.answer, dict) else None
        self.kind = str(error.get("type")) if isinstance(error, dict) else "FleetError"


@dataclass(frozen=True)
class Step:
    """What an operator asks for.

    Attributes:
        verb: as in `peanut-serve ctl release`.
        name: of the variant.
        by: who asks.
        given: what else; see `GIVEN`.
    """

    verb: str
    name: str
    by: Caller
    given: BaseModel | None = None


class FleetReleases:
    """Makes the steps of releases, and shows them.

    Args:
        engines: the replicas.
        wanted: where releases are remembered.
        changes: makes all other changes.
        log: the audit log.
    """

    def __init__(
        self, engines: DeploymentHandle[Any], wanted: WantedStore, changes: FleetChanges, log: AuditLog
    ) -> None:
        self._engines, self._wanted, self._changes, self._log = engines, wanted, changes, log

    async def all(self) -> list[FleetReleaseStatus]:
        """The latest release of every variant that had one. Raises as `ask_all`."""
        state, entries = await self._wanted.newest(), await self._ask("releases", within=_GLANCE)
        return [
            joint_release(name, wanted.release, entries)
            for name, wanted in sorted(state.variants.items())
            if wanted.release is not None and not wanted.removed
        ]

    async def show(self, name: str) -> FleetReleaseStatus:
        """The latest release of a variant. Raises `UnknownVariantError` if it has none, and as `ask_all`."""
        release = (await self._wanted.newest()).of(name).release
        if release is None:
            raise UnknownVariantError(f"{shown(name)} has no release; stage a version of it")
        return joint_release(name, release, await self._ask("releases", within=_GLANCE))

    async def make(self, step: Step) -> FleetReleaseStatus | None:
        """Make a step, also if the caller goes away. Returns the release then; None for `hold`.

        Raises `PeanutError` if nothing was changed, and what `ask_all` raises.
        """
        return await self._changes.to_the_end(self._make(step))

    async def _make(self, step: Step) -> FleetReleaseStatus | None:
        began, result = time.monotonic(), dict[str, Any]()
        given = step.given.model_dump() if step.given is not None else {}
        try:
            async with self._changes.lock(step.name):
                before = (await self._wanted.newest()).of(step.name)
                if before.removed:
                    raise UnknownVariantError(f"there is no variant {shown(step.name)}")
                await self._carry_out(step, before)
                after = (await self._wanted.newest()).of(step.name)
            release = await self.show(step.name) if after.release is not None else None
            is_told = release is not None and not release.agree
            result = {
                "outcome": "disagreed" if is_told else "done",
                "staged": (after.open_release or before.open_release or Release.model_construct(digest=None)).digest,
                "old": before.held,
                "new": after.held,
                **({"error": release.message} if release is not None and is_told else {}),
            }
            return None if step.verb == "hold" else release
        except BaseException as error:
            kind = "refused" if isinstance(error, PeanutError) else "failed"
            result = {"outcome": kind, "error": f"{type(error).__name__}: {error}"}
            raise
        finally:
            facts = {**given, **result, "seconds": round(time.monotonic() - began, 3)}
            self._log.write(step.by, f"release {step.verb}", step.name, facts)

    async def _carry_out(self, step: Step, wanted: Wanted) -> None:
        given: Any = step.given
        if step.verb == "hold":
            await self._hold(step.name, wanted)
        elif step.verb == "stage":
            await self._stage(step.name, wanted, given or Staging(source=None, digest=None))
        elif step.verb == "check":
            await self._check(step.name, wanted)
        elif step.verb == "weight":
            await self._weigh(step.name, wanted, given)
        elif step.verb == "promote":
            await self._promote(step.name, wanted, (given or Promotion(force=False)).force)
        else:
            await self._rollback(step.name, wanted, (given or Reason(reason=None)).reason)

    async def _hold(self, name: str, wanted: Wanted) -> None:
        if wanted.held is not None:
            return
        entry = await self._at_one("hold_first", name)
        digest = VariantStatus.model_validate(entry["answer"]).digest
        await self._adopt(name, lambda state: state.after("hold", name, digest))

    async def _stage(self, name: str, wanted: Wanted, staging: Staging) -> None:
        check_none_open(name, wanted.release)
        entry = await self._at_one("stage_first", name, staging.model_dump())
        staged = ReleaseStatus.model_validate(entry["answer"])
        release = Release(
            digest=staged.digest,
            source=staged.source,
            replaces=staged.replaces,
            replaces_source=wanted.target or name,
            events=wanted.release.events if wanted.release is not None else [],
        )
        release = noted(release, "stage", f"from {staged.source}")
        await self._adopt(name, lambda state: state.with_one(name, state.of(name).staged(name, release)))

    async def _check(self, name: str, wanted: Wanted) -> None:
        _release_of(name, wanted)
        entries = await self._ask("call_admin", "POST", f"{release_path(name)}/check", None)
        refused = [entry for entry in entries if entry["status"] >= 400]
        if refused and len(refused) == len(entries):
            raise ReplicaRefusedError(refused[0])

    async def _weigh(self, name: str, wanted: Wanted, given: Weighing) -> None:
        release = _release_of(name, wanted)
        if given.weight and not given.force:
            check_joint_passed(await self.show(name))
        rules = {"weight": given.weight, "max_error_rate": given.max_error_rate, "min_requests": given.min_requests}
        weighed = noted(release, "weight", f"{given.weight} %{', forced' if given.force else ''}", **rules)

        def change(state: WantedState) -> WantedState:
            now = state.of(name)
            _same(name, now, release)
            return state.with_one(name, now.model_copy(update={"release": weighed, "forced": given.force}))

        await self._adopt(name, change)

    async def _promote(self, name: str, wanted: Wanted, is_forced: bool) -> None:
        release = _release_of(name, wanted)
        if not is_forced:
            found = await self.show(name)
            check_joint_passed(found)
            check_everywhere(found)
        detail = f"from {release.replaces[:12]}{', forced' if is_forced else ''}"
        await self._adopt(
            name, lambda state: state.with_one(name, _same(name, state.of(name), release).promoted(release, detail))
        )

    async def _rollback(self, name: str, wanted: Wanted, reason: str | None) -> None:
        release = wanted.release
        if release is None:
            raise UnknownVariantError(f"{shown(name)} has no release; stage a version of it")
        if not release.is_open and (release.state != "promoted" or wanted.held != release.digest):
            raise ReleaseError(
                f"{name} has no version that a release gave it; peanut-serve ctl rollback {name} returns to earlier "
                "ones"
            )
        await self._adopt(
            name,
            lambda state: state.with_one(name, _same(name, state.of(name), release).rolled_back(release, reason)),
        )

    async def end_failing(self, state: WantedState) -> None:
        """Roll releases back that have failed too often: at one replica, or at all of them together."""
        entries = await self._ask("releases", within=_GLANCE)
        for name, wanted in state.variants.items():
            if (release := wanted.open_release) is None or not release.weight or self._changes.lock(name).locked():
                continue
            found = joint_release(name, release, entries)
            reason = failure_of(found) or too_many_failed(release, found.watched, found.failed)
            if reason is not None:
                logger.warning(
                    "the release of version %s of %s is rolled back: %s", release.digest[:12], name, reason
                )
                await self.make(Step("rollback", name, _FRONT, Reason(reason=reason[:500])))

    async def _adopt(self, name: str, change: Change) -> None:
        """Remember a change, and bring all replicas there. Those that cannot follow are told by `show`."""
        state = await self._wanted.change(change)
        await self._ask("adopt", state.model_dump(mode="json"), name, [])

    async def _at_one(self, method: str, name: str, *arguments: Any) -> Entry:
        """The answer of the replica where a request for a name would go. Raises `ReplicaRefusedError`."""
        call = self._engines.options(method_name=method, multiplexed_model_id=name)
        async with asyncio.timeout(_LONGEST):
            entry: Entry = await call.remote(name, *arguments)
        if entry["status"] >= 400:
            raise ReplicaRefusedError(entry)
        return entry

    async def _ask(self, method: str, *arguments: Any, within: float = _LONGEST) -> Sequence[Entry]:
        return await ask_all(self._engines, method, *arguments, within=within)


def _release_of(name: str, wanted: Wanted) -> Release:
    """The open release of a name. Raises `UnknownVariantError`, `ReleaseError`."""
    if wanted.release is None:
        raise UnknownVariantError(f"{shown(name)} has no release; stage a version of it")
    check_open(name, wanted.release)
    return wanted.release


def _same(name: str, now: Wanted, release: Release) -> Wanted:
    """What is wanted of a name now. Raises `ReleaseError` if its release is another one than a moment ago."""
    if now.release != release:
        raise ReleaseError(f"the release of {name} was changed meanwhile; see peanut-serve ctl release show {name}")
    return now
