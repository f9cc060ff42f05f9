"""Changes that operators make to all replicas: made everywhere, remembered for later replicas, and audited."""

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from converters.errors import PeanutError
from peanut_serve.errors import EngineDownError, VariantInUseError
from peanut_serve.ray.fleet.asking import Entry, ask_all
from peanut_serve.ray.fleet.engine_admin import path_of
from peanut_serve.ray.fleet.joint import rollback_target
from peanut_serve.ray.fleet.store import WantedStore
from peanut_serve.ray.fleet.wanted import WantedState
from peanut_serve.web.audit import AuditLog, Caller
from peanut_serve.web.fleet_schema import FleetEntry
from peanut_serve.web.schema import Registration, Rollback, VariantStatus

_LONGEST = 3600.0  # seconds; variants are evaluated
_GLANCE = 10.0  # seconds, for what is known already
_RELOAD = "reload"
_OF_VERSIONS = ("reload", "rollback", "unregister")  # what a release decides while it is open

_T = TypeVar("_T")


@dataclass(frozen=True)
class Change:
    """What an operator asks for.

    Attributes:
        action: the verb, as in `peanut-serve ctl`.
        name: of the variant.
        by: who asks.
        registration: for `register`.
        rollback: for `rollback`.
        drain: for `unregister`.
    """

    action: str
    name: str
    by: Caller
    registration: Registration | None = None
    rollback: Rollback = field(default_factory=Rollback)
    drain: bool = False

    @property
    def given(self) -> dict[str, Any]:
        """What was given beside the name, for the audit log."""
        given: dict[str, dict[str, Any]] = {
            "register": {"source": self.registration.source if self.registration else None},
            "rollback": {"digest": self.rollback.digest, "hold": True},
            "unregister": {"drain": self.drain},
        }
        return given.get(self.action, {})


class FleetChanges:
    """Makes changes, one at a time for each name.

    Args:
        engines: the replicas.
        wanted: where changes are remembered.
        log: the audit log.
    """

    def __init__(self, engines: DeploymentHandle[Any], wanted: WantedStore, log: AuditLog) -> None:
        self._engines, self._wanted, self._log = engines, wanted, log
        self._locks: dict[str, asyncio.Lock] = {}
        self._running: set[asyncio.Task[Any]] = set()

    async def make(self, change: Change) -> list[Entry]:
        """Make a change at all replicas, also if the caller goes away. Returns an entry per replica.

        Raises `PeanutError` if nothing was changed, and what `ask_all` raises.
        """
        return await self.to_the_end(self._make(change))

    async def make_at_one(self, change: Change) -> Entry:
        """Swap a variant in, or preload it, where a request for it would go now. Returns that replica's entry."""
        return await self.to_the_end(self._make_at_one(change))

    def lock(self, name: str) -> asyncio.Lock:
        """Taken by whatever changes a name."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def to_the_end(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Await work that goes on if the caller goes away."""
        # without Serve's context of the request: what is asked in that is cancelled with the request
        task = asyncio.create_task(work, context=Context())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _make(self, change: Change) -> list[Entry]:
        began, entries, old = time.monotonic(), list[Entry](), dict[str, str | None]()
        result: dict[str, Any] = {}
        try:
            async with self.lock(change.name):
                statuses = await self._statuses(change.name)
                old = {replica: status.digest for replica, status in statuses.items()}
                # a change that cannot be remembered is not made
                check_no_release(change, await self._wanted.newest())
                given, entries = await self._everywhere(change, list(statuses.values()))
                entries = await self._remembered(change, given, entries)
        except BaseException as error:
            kind = "refused" if isinstance(error, PeanutError) and not entries else "failed"
            result = {"outcome": kind, "error": f"{type(error).__name__}: {error}"}
            raise
        finally:
            facts = {**change.given, **(result or _outcome(entries)), **_per_replica(entries, old)}
            self._log.write(change.by, change.action, change.name, {**facts, "seconds": _since(began)})
        return entries

    async def _everywhere(self, change: Change, statuses: Sequence[VariantStatus]) -> tuple[str | None, list[Entry]]:
        """What is to be remembered beside the verb, and what the replicas answered."""
        name, given = change.name, None
        if change.action == "rollback":
            given = rollback_target(name, statuses, change.rollback.digest)
            entries = await self._ask("roll_back", name, given)
        elif change.action == "register" and change.registration is not None:
            given = change.registration.source
            entries = await self._ask("call_admin", "POST", "/variants", change.registration.model_dump())
        elif change.action == "unregister":
            drain = "?drain=true" if change.drain else ""
            entries = await self._ask("call_admin", "DELETE", path_of(name) + drain, None)
        else:
            entries = await self._ask("call_admin", "POST", f"{path_of(name)}/{change.action}", None)
        return given, entries

    async def _remembered(self, change: Change, given: str | None, entries: list[Entry]) -> list[Entry]:
        """The entries after the others have followed. Raises `EngineDownError` if Ray's store has failed since."""
        done = [entry["replica"] for entry in entries if FleetEntry.model_validate(entry).is_done]
        if not done:
            return entries
        try:
            state = await self._wanted.change(lambda state: state.after(change.action, change.name, given))
        except EngineDownError as error:
            raise EngineDownError(
                f"{change.action} of {change.name} was made at {', '.join(done)}, and could not be remembered "
                f"({error}): replicas that start later will not have it; do it again",
                error.retry_after,
            ) from error
        adopted = await self._ask("adopt", state.model_dump(mode="json"), change.name, done)
        return _with_adopted(change.action, entries, adopted)

    async def _make_at_one(self, change: Change) -> Entry:
        began = time.monotonic()
        entry: Entry = {"replica": None, "status": 503, "error": "the replica did not answer"}
        try:
            call = self._engines.options(method_name="call_admin", multiplexed_model_id=change.name)
            async with asyncio.timeout(_LONGEST):
                entry = await call.remote("POST", f"{path_of(change.name)}/{change.action}", None)
            return entry
        finally:
            facts = {**_outcome([entry]), **_per_replica([entry], {})}
            self._log.write(change.by, change.action, change.name, {**facts, "seconds": _since(began)})

    async def _statuses(self, name: str) -> dict[str, VariantStatus]:
        entries = await ask_all(self._engines, "call_admin", "GET", path_of(name), None, within=_GLANCE)
        found = {entry["replica"]: entry["answer"] for entry in entries if entry["status"] == 200}
        return {replica: VariantStatus.model_validate(answer) for replica, answer in found.items()}

    async def _ask(self, method: str, *arguments: Any) -> list[Entry]:
        return await ask_all(self._engines, method, *arguments, within=_LONGEST)


def check_no_release(change: Change, state: WantedState) -> None:
    """Raise `VariantInUseError` if an open release does not allow a change."""
    release = state.of(change.name).open_release
    if release is not None and change.action in _OF_VERSIONS:
        raise VariantInUseError(
            f"{change.name} has a release of version {release.digest[:12]}; promote it or roll it back first, with "
            "peanut-serve ctl release"
        )


def _with_adopted(action: str, entries: Sequence[Entry], adopted: Sequence[Entry]) -> list[Entry]:
    """The entries, with those of replicas that have started meanwhile, or have made up for it.

    A failed reload stays failed: nothing else is wanted of a replica than before it.
    """
    by_name = {entry["replica"]: entry for entry in entries}
    for entry in adopted:
        known = by_name.get(entry["replica"])
        if entry["replica"] is not None and (known is None or (known["status"] >= 300 and action != _RELOAD)):
            by_name[entry["replica"]] = entry
    return sorted(by_name.values(), key=lambda entry: str(entry["replica"]))


def _outcome(entries: Sequence[Entry]) -> dict[str, Any]:
    made = [FleetEntry.model_validate(entry) for entry in entries]
    done, digests = [one.is_done for one in made], {one.digest for one in made if one.digest}
    if done and all(done):
        return {"outcome": "done" if len(digests) <= 1 else "disagreed"}
    return {"outcome": "disagreed" if any(done) else "refused" if done else "failed"}


def _per_replica(entries: Sequence[Entry], old: Mapping[str, str | None]) -> dict[str, Any]:
    made = [FleetEntry.model_validate(entry) for entry in entries]
    replicas = [
        {
            "replica": one.replica,
            "status": one.status,
            "old": old.get(one.replica or ""),
            "new": one.digest,
            **({"error": one.reason} if one.reason else {}),
        }
        for one in made
    ]
    return {"replicas": replicas}


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
