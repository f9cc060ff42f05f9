"""The admin operations on the variants of a server, and the metrics."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from support.server.fake_engine import identity
from support.server.rig import NAMES, SIZE, Rig, RunRig, make_weights, rig_runner, until
from support.server.weights import Weights
from support.tiny_models import edit_json

from peanut_serve.errors import SwapError, UnknownVariantError, VariantError, VariantInUseError
from peanut_serve.variants.host_weights import HostMemoryError
from peanut_serve.web.audit import AuditedControl, AuditLog
from peanut_serve.web.operator import VariantControl
from peanut_serve.web.schema import VariantState


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("serving"))


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    return rig_runner(weights, tmp_path, monkeypatch)


def test_activate(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        control = VariantControl(rig.server)
        assert (await control.activate("v1")).state is VariantState.ACTIVE
        assert identity(rig.engine.weights) == rig.expected["v1"]
        assert rig.server.catalogue.records.active == "v1"
        rig.engine.fail("apply")
        swaps = rig.engine.calls.count("apply")
        with pytest.raises(SwapError, match="rolled back"):
            await control.activate("v2")
        await rig.ask("v1")
        assert rig.engine.calls.count("apply") == swaps + 2  # there and back, without a retry
        assert rig.server.catalogue.records.active == "v1"
        await control.activate("v2")
        for name, error in (("none", UnknownVariantError), ("broken", VariantError)):
            with pytest.raises(error):
                await control.activate(name)
        assert control.engine().active == "v2"

    run_rig(test)


def test_the_audit_log_has_the_weights_before_and_after(run_rig: RunRig, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        control = AuditedControl(VariantControl(rig.server), AuditLog(tmp_path / "audit.jsonl"))
        base = control.engine().digest
        await control.activate("v1")
        rig.engine.fail("apply")
        with pytest.raises(SwapError):
            await control.activate("v2")
        done, failed = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
        v1 = control.variant("v1").digest
        assert (done["old"], done["new"], done["outcome"]) == (base, v1, "done")
        assert (failed["old"], failed["new"], failed["outcome"]) == (v1, v1, "refused")
        assert "rolled back" in failed["error"]

    run_rig(test)


def test_pinned_weights_stay(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        control = VariantControl(rig.server)
        await rig.ask("v2")
        await rig.ask("base")
        await rig.ask("v3")
        await rig.ask("base")
        assert [control.variant(name).host_bytes > 0 for name in NAMES] == [False, True, False, True]  # v1 is pinned
        await control.pin("v2", True)
        with pytest.raises(HostMemoryError, match="unpin a variant"):
            await control.pin("v3", True)
        assert not control.variant("v3").pinned
        with pytest.raises(HostMemoryError, match="unpin a variant"):
            await rig.ask("v3")
        await control.pin("v2", False)
        await rig.ask("v3")
        assert [control.variant(name).host_bytes > 0 for name in NAMES] == [False, True, False, True]

    run_rig(test, host_cache=2 * SIZE, pin=("v1",))


def test_weights_in_use_are_not_evicted(run_rig: RunRig) -> None:
    """Those that requests wait for, and the active ones, which a rollback needs."""

    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        tasks = [await rig.asking("base"), await rig.asking("v1")]
        for name in ("v2", "v3", "v2"):
            await rig.server.prepare(name)  # takes the other place
        rig.engine.go.set()
        await asyncio.gather(*tasks)
        for name in ("v3", "v2"):
            await rig.server.prepare(name)
        rig.engine.fail("apply")
        with pytest.raises(SwapError, match="the swap failed and was rolled back"):
            await rig.ask("v2")
        assert identity(rig.engine.weights) == rig.expected["v1"]

    run_rig(test, host_cache=2 * SIZE, max_wait=60)


@pytest.mark.parametrize("mode", ["lora", "merged", "auto"])
def test_a_kind_is_the_same_before_and_after_the_first_request(mode: str, run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        def kinds() -> dict[str, str]:
            return {name: control.variant(name).kind for name in NAMES}

        control = VariantControl(rig.server)
        before = kinds()
        assert set(before.values()) == {"base", "adapter" if mode == "merged" else "lora"}
        for name in NAMES:
            await rig.server.prepare(name)
        assert kinds() == before

    run_rig(test, mode=mode)


def test_preloading(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        states = [VariantControl(rig.server).variant(name).state for name in ("v1", "v2")]
        assert states == [VariantState.READY, VariantState.REGISTERED]

    run_rig(test, preload=("v1",))
    with pytest.raises(VariantError, match="broken cannot be served"):
        run_rig(test, preload=("broken",))


def test_pinned_names_that_are_gone_stop_no_start(
    run_rig: RunRig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The records say that it is pinned, and what it is made from was removed meanwhile; it may come back."""
    state = tmp_path / "kept"

    async def before(rig: Rig) -> None:
        control = VariantControl(rig.server)
        await control.register("new", "v1")
        await control.pin("new", True)
        await control.pin("v2", True)

    async def after(rig: Rig) -> None:
        assert VariantControl(rig.server).variant("new").pinned
        assert VariantControl(rig.server).variant("v2").host_bytes > 0
        await rig.ask("v1")

    run_rig(before, state=state)
    again = shutil.copytree(state, tmp_path / "again")
    records = json.loads((again / "variants.json").read_text())["variants"]
    edit_json(again / "variants.json", variants={**records, "new": {**records["new"], "source": "gone"}})
    run_rig(after, state=again)
    assert "variant=new is pinned, but cannot be prepared: " in caplog.text


def test_adding_and_removing_variants(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        control = VariantControl(rig.server)
        with pytest.raises(VariantError):
            await control.register("new", "broken")
        assert not rig.server.has("new")
        assert (await control.register("new", "v1")).state is VariantState.READY
        rig.engine.go.clear()
        running = asyncio.create_task(rig.ask("new"))
        await until(lambda: rig.engine.running == 1)
        with pytest.raises(VariantInUseError, match="new has 1 requests"):
            await control.unregister("new", drain=False)
        removing = asyncio.create_task(control.unregister("new", drain=True))
        await until(lambda: not rig.server.has("new"))
        with pytest.raises(UnknownVariantError):
            await rig.ask("new")
        assert not removing.done()
        rig.engine.go.set()
        await asyncio.gather(running, removing)

    run_rig(test)


def test_a_name_in_two_folders_does_not_affect_others(run_rig: RunRig, weights: Weights, tmp_path: Path) -> None:
    shutil.copytree(weights.tasks / "v1", tmp_path / "more" / "v1")

    async def test(rig: Rig) -> None:
        listed = [one.name for one in await VariantControl(rig.server).variants()]
        assert listed == ["base", "broken", "v1", "v2", "v3"]
        await rig.ask("v2")

    run_rig(test, roots=(str(weights.tasks), str(tmp_path / "more")))


def test_metrics(run_rig: RunRig) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    async def test(rig: Rig) -> None:
        def values() -> list[float]:
            return [
                value("peanut_swaps_total", variant="v1", outcome="done"),
                value("peanut_swaps_total", variant="v1", outcome="failed"),
                value("peanut_rollbacks_total"),
                value("peanut_engine_restarts_total"),
                value("peanut_evaluation_seconds_count"),
                value("peanut_swap_seconds_count", phase="apply"),
                value("peanut_queue_seconds_count", variant="v1"),
            ]

        def change() -> list[float]:
            nonlocal before
            before, old = values(), before
            return [new - then for new, then in zip(before, old, strict=True)]

        before = values()
        await rig.ask("v1")
        assert change() == [1, 0, 0, 0, 1, 1, 1]
        await rig.ask("base")
        rig.engine.fail("apply")
        with pytest.raises(SwapError):
            await rig.ask("v1")
        assert change() == [0, 1, 1, 0, 0, 1, 0]
        rig.server.driver.clear_failure(str(rig.server.catalogue.find("v1").record.digest))
        rig.engine.fail("apply", "die")
        with pytest.raises(SwapError):
            await rig.ask("v1")
        assert change() == [0, 1, 1, 1, 0, 0, 0]
        assert value("peanut_host_cache_bytes") == rig.server.cache.nbytes > 0
        assert value("peanut_ready") == 1

    run_rig(test)
