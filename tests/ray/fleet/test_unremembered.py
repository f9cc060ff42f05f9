"""The store fails while one replica has done first what the others are to follow: none is left alone with it."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.fleet.key_values import Store
from support.fleet.replayed import Engine

from peanut_serve.errors import EngineDownError
from peanut_serve.ray.fleet import replay as module
from peanut_serve.ray.fleet.changes import FleetChanges
from peanut_serve.ray.fleet.operated import OperatedReplica
from peanut_serve.ray.fleet.releases import FleetReleases, Step
from peanut_serve.ray.fleet.store import WantedStore
from peanut_serve.releases.schema import Staging
from peanut_serve.web.audit import AuditLog, Caller

STEPS = {
    "stage": Step("stage", "v1", Caller(), Staging(source="v2", digest=None)),
    "hold": Step("hold", "v1", Caller()),
}


class Replica(OperatedReplica):
    """What operators use of a replica, with a fake engine."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self._replay, self.engine = name, engine.replay, engine

    async def call_admin(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        return {**await self.engine.call(method, path, body), "replica": self.name}

    @property
    def found(self) -> tuple[bool, bool]:
        """Whether it has a staged version of v1, and whether that is held."""
        record = self.engine.admin.records["v1"]
        return (record.get("release") or {}).get("state") == "staged", record["held"]


class Handle:
    """Of a deployment; the first replica is the one where requests for a name go."""

    def __init__(self, replicas: list[Replica]) -> None:
        self._replicas = replicas

    def options(self, *, method_name: str, multiplexed_model_id: str) -> Any:
        return SimpleNamespace(remote=getattr(self._replicas[0], method_name))

    def broadcast(self, method: str, *arguments: Any) -> Any:
        def result(replica: Replica) -> Any:
            return SimpleNamespace(get_async=lambda: getattr(replica, method)(*arguments))

        async def results() -> list[Any]:
            return [result(replica) for replica in self._replicas]

        return SimpleNamespace(_fetch_replica_results_async=results)


async def made(kv: Store, step: Step, folder: Path, fails: Callable[[int, bool], bool]) -> bool:
    """Make a step while the store fails, and let the replicas look again; whether the step failed."""
    folder.mkdir()
    store = WantedStore("app", "base", None)
    replicas = [Replica(name, Engine(folder, name, store=store)) for name in "ab"]
    handle: Any = Handle(replicas)
    log = AuditLog(folder / "audit.jsonl")
    releases = FleetReleases(handle, store, FleetChanges(handle, store, log), log)
    for replica in replicas:
        await replica._replay.start()
    kv.calls, kv.fails = 0, fails
    has_failed = False
    try:
        await releases.make(step)
    except EngineDownError:
        has_failed = True
    kv.fails = lambda number, is_done: False
    running = [asyncio.create_task(replica._replay.run()) for replica in replicas]
    await asyncio.wait_for(agreed(store, replicas), 10)
    for task in running:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    return has_failed


async def agreed(store: WantedStore, replicas: list[Replica]) -> None:
    """Return once all replicas have what is wanted, and know of it."""

    async def is_so() -> bool:
        state = await store.newest()
        wanted = state.of("v1")
        right = (wanted.open_release is not None, wanted.held is not None)
        return all(one.found == right and one._replay.state.revision == state.revision for one in replicas)

    while not await is_so():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("verb", STEPS)
@pytest.mark.parametrize("how", ["before", "after", "away"])
def test_no_replica_is_left_alone(verb: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of the store fails once, before or after its work, or is the first of many that fail."""
    monkeypatch.setattr(module, "_LOOK", 0.005)
    monkeypatch.setattr(module, "_UNTOLD", 0.02)
    failed = 0
    for first in count():
        kv = Store.instead_of_rays(monkeypatch)

        def fails(number: int, after: bool, first: int = first) -> bool:
            return number >= first if how == "away" else (number, after) == (first, how == "after")

        failed += asyncio.run(made(kv, STEPS[verb], tmp_path / str(first), fails))
        if kv.calls <= first:
            break
    assert failed >= 4


def test_what_an_engine_refused_first_is_not_undone(tmp_path: Path) -> None:
    async def test() -> None:
        replica = Replica("a", Engine(tmp_path))
        staging = {"source": "none", "digest": None}
        assert (await replica.stage_first("v1", staging))["status"] == 404
        assert replica._replay._first == {}
        assert (await replica.stage_first("v1", {**staging, "source": "v2"}))["status"] == 200
        assert replica._replay._first.keys() == {"v1"}

    asyncio.run(test())


def test_what_is_remembered_is_not_undone_while_the_store_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Front remembered it, and went before it told the replica, which cannot look: it may hold what is wanted."""
    monkeypatch.setattr(module, "_LOOK", 0.005)
    monkeypatch.setattr(module, "_UNTOLD", 0.02)
    kv = Store.instead_of_rays(monkeypatch)

    async def test() -> None:
        store = WantedStore("app", "base", None)
        replica = Replica("a", Engine(tmp_path, store=store))
        await replica._replay.start()
        digest = (await replica.hold_first("v1"))["answer"]["digest"]
        await store.change(lambda state: state.after("hold", "v1", digest))
        kv.fails = lambda number, is_done: True
        running = asyncio.create_task(replica._replay.run())
        await asyncio.sleep(0.2)
        assert replica.found == (False, True)
        kv.fails = lambda number, is_done: False
        await asyncio.wait_for(agreed(store, [replica]), 10)
        assert "reload" not in replica.engine.calls  # which would have taken what is in the files
        running.cancel()

    asyncio.run(test())


def test_a_name_of_a_staged_version_is_settled_once(tmp_path: Path) -> None:
    """It belongs to its variant, as `settle` sees it: otherwise it would be undone again every second."""

    async def test() -> None:
        replay = Engine(tmp_path).replay
        replay.note_first("v1@staged")
        await replay._undo(asyncio.get_running_loop().time() + 1)
        assert replay._first == {}

    asyncio.run(test())
