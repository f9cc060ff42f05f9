"""The history of swaps: each attempt with its cause, who waited, its phases, and how it ended."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from support.server.rig import SIZE, Rig, RunRig, make_weights, rig_runner, until
from support.server.weights import Weights

from peanut_serve.errors import EngineDownError, SwapError
from peanut_serve.swapping import history
from peanut_serve.swapping.history import SwapHistory
from peanut_serve.swapping.policy import Queue, View
from peanut_serve.swapping.transaction import Report
from peanut_serve.web.operator import VariantControl
from peanut_serve.web.schema import SwapStatus

PHASES = ["quiesce", "apply", "invalidate", "check"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("history"))


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    return rig_runner(weights, tmp_path, monkeypatch)


def swaps(rig: Rig) -> list[SwapStatus]:
    return VariantControl(rig.server).swaps()


def test_what_an_operator_asked_for(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await rig.server.activate("v1")
        (done,) = swaps(rig)
        assert (done.number, done.cause, done.outcome, done.error) == (1, "operator", "done", None)
        assert (done.before, done.target) == ("base", "v1")
        assert done.digest == rig.server.facts("v1").digest != done.before_digest
        assert (done.running, done.waiting) == (0, {})  # the operator's own ticket is no request
        assert list(done.seconds) == PHASES
        assert done.nbytes > 0
        assert done.tensors == len(rig.engine.applied[-1])

    run_rig(test)


def test_who_waited_and_why(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("v1")
        rig.engine.go.clear()
        tasks = [await rig.asking(name) for name in ("v1", "v2", "v2", "v3")]
        await until(lambda: len(rig.server.driver.history.latest()) > 0 and rig.server.driver.state == "swapping")
        rig.engine.go.set()
        await asyncio.gather(*tasks)
        overdue = next(one for one in reversed(swaps(rig)) if one.target == "v2")
        assert (overdue.cause, overdue.running) == ("overdue", 1)
        assert overdue.waiting["v2"] >= 1
        assert overdue.longest_wait > 0
        assert {one.target for one in swaps(rig)} == {"v1", "v2", "v3"}

    run_rig(test, max_wait=0.02, min_dwell=5)


def test_an_idle_engine_is_swapped_at_once(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("v1")
        assert [(one.cause, one.waiting) for one in swaps(rig)] == [("idle", {"v1": 1})]

    run_rig(test, max_wait=60)


def counts(outcome: str) -> tuple[float, float]:
    """Swaps to v2 with an outcome, and rollbacks, in the metrics."""
    swapped = REGISTRY.get_sample_value("peanut_swaps_total", {"variant": "v2", "outcome": outcome})
    return swapped or 0.0, REGISTRY.get_sample_value("peanut_rollbacks_total") or 0.0


@pytest.mark.parametrize(
    ("faults", "outcome", "phases", "match"),
    [
        ([("pause", "raise", 1)], "cancelled", {"quiesce"}, "could not be paused"),
        ([("apply", "raise", 1)], "rolled_back", {*PHASES, "roll_back"}, "rolled back"),
        ([("ask_canary", "raise", 1), ("apply", "raise", 2)], "restarted", {"restart"}, "so did the rollback"),
        ([("apply", "die", 1)], "restarted", {"restart"}, "restarted"),
    ],
)
def test_failures(
    run_rig: RunRig, faults: list[tuple[str, str, int]], outcome: str, phases: set[str], match: str
) -> None:
    async def test(rig: Rig) -> None:
        await rig.server.prepare("v2")
        before = {kind: counts(kind) for kind in ("cancelled", "failed")}
        for fault in faults:
            rig.engine.fail(*fault)
        with pytest.raises(SwapError, match=match) as error:
            await rig.server.activate("v2")
        await until(lambda: len(swaps(rig)) > 0)
        failed = swaps(rig)[0]
        assert (failed.outcome, failed.error, failed.target) == (outcome, str(error.value), "v2")
        counted = ("cancelled", 0) if outcome == "cancelled" else ("failed", 1)
        assert [now - then for now, then in zip(counts(counted[0]), before[counted[0]], strict=True)] == [
            1,
            counted[1],
        ]
        assert phases <= set(failed.seconds)

    run_rig(test)


def test_an_engine_that_dies_and_stays_down(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.fail("restart", "raise", 1)
        rig.engine.die()
        rig.server.driver.wake()
        await until(lambda: len(swaps(rig)) >= 2)
        again, down = swaps(rig)[:2]
        assert (down.cause, down.outcome) == ("engine_died", "down")
        assert "restarting it failed" in str(down.error)
        assert (again.cause, again.outcome, again.error) == ("engine_died", "restarted", None)

    run_rig(test)


def test_a_swap_after_which_there_is_no_engine(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.fail("apply", "die")
        rig.engine.fail("restart", "raise", 1)
        with pytest.raises(EngineDownError):
            await rig.server.activate("v2")
        await until(lambda: len(swaps(rig)) >= 1)
        assert swaps(rig)[-1].outcome == "down"
        assert swaps(rig)[-1].cause == "operator"

    run_rig(test)


def test_the_history_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_MOST_RECORDS", 3)
    kept = SwapHistory(lambda digest: digest.upper())
    view = View(10.0, "a", 0.0, 2, (Queue("b", (4.0, 5.0)), Queue("c", (7.0,))), 1.0)
    for _ in range(5):
        kept.end(kept.begin("b", "paid", view, ["c"]), Report(), SwapError("x" * 9000))
    latest = kept.latest()
    assert [record.number for record in latest] == [5, 4, 3]
    assert len(latest[0].error or "") == 2000
    assert (latest[0].before, latest[0].target, latest[0].waiting) == ("A", "B", {"B": 2})
    assert latest[0].longest_wait == 6.0


def test_what_evicting_frees(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("v1")
        await rig.server.prepare("v2")
        await rig.server.pin("v3", True)
        frees = {name: rig.server.facts(name).evictable_bytes for name in ("base", "v1", "v2", "v3")}
        assert frees == {"base": 0, "v1": 0, "v2": SIZE, "v3": 0}  # v1 is active, v3 is pinned
        assert rig.server.engine_facts().base_copy_bytes > 0

    run_rig(test)


def test_durations_and_outcomes(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        for seconds in range(1, 101):
            rig.server.record_end("v1", "200", float(seconds))
        for outcome in ("503", "refused", "disconnected"):
            rig.server.record_end("v1", outcome, 1e9)
        rig.server.record_end("made up by a client", "200", 1.0)
        traffic = {one.name: one for one in await VariantControl(rig.server).traffic()}
        assert (traffic["v1"].answered, traffic["v1"].failed) == (100, 3)
        assert (traffic["v1"].p50_seconds, traffic["v1"].p95_seconds) == (51.0, 96.0)
        assert (traffic["v2"].answered, traffic["v2"].p50_seconds) == (0, None)
        assert "made up by a client" not in traffic

    run_rig(test)
