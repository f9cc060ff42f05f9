"""Residents beside releases, variants that are swapped, and failures: who is followed, who counts, who gives way."""

import asyncio
import shutil
from pathlib import Path

import pytest
from support.adaptive.effective import who
from support.server.releases import releases_of
from support.server.rig import SIZE, Rig, RunRig, make_weights, rig_runner, until
from support.server.weights import Weights

from peanut_serve.web.operator import VariantControl


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("releases-of-residents"))


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    """Each test changes its own copy of the variants; `whole` is a merged folder, which cannot be LoRA."""
    shutil.copytree(weights.tasks, tmp_path / "tasks", dirs_exist_ok=True)
    shutil.copytree(weights.tasks.parent / "merged-v2", tmp_path / "tasks" / "whole")
    run = rig_runner(weights, tmp_path, monkeypatch)
    fixed = {"mode": "auto", "roots": (str(tmp_path / "tasks"),), "resident": "auto", "max_wait": 5.0}
    return lambda test, **options: run(test, **{**fixed, **options})


async def ask(rig: Rig, name: str, weights: Weights) -> tuple[list[str], str]:
    """Whose weights answer a request, and how."""
    task = asyncio.current_task()
    assert task is not None
    async with rig.server.serving(name, task.cancel) as admitted:
        return who(rig.engine, admitted.lora, weights), admitted.path


async def make_staged_resident(rig: Rig, tmp_path: Path) -> object:
    """Stage v2 as a version of v1, and let traffic have made it the resident; nobody else decides from now on."""
    rig.server._choosing.cancel()
    await rig.server.prepare("v1")
    releases = releases_of(rig, tmp_path / "audit.jsonl")
    await releases.stage("v1", "v2")
    await rig.server.chooser._become("v1@staged", "saves")
    merged = rig.server.residents.wanted.merged.digest
    await until(lambda: rig.server.gate.weights == merged and rig.server.driver.state == "serving")
    return releases


def test_a_version_that_is_promoted_stays_the_resident(run_rig: RunRig, weights: Weights, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        releases = await make_staged_resident(rig, tmp_path)
        await releases.promote("v1", False)
        swaps, merged = rig.swaps, rig.server.gate.weights
        for _ in range(3):
            await rig.server.chooser.look()
            await asyncio.sleep(0.05)
        assert await ask(rig, "v1", weights) == (["v2"], "merged")
        assert await ask(rig, "v3", weights) == (["v3"], "complement")
        assert (rig.swaps, rig.server.gate.weights) == (swaps, merged)
        assert VariantControl(rig.server).engine().resident == "v1"

    run_rig(test)


def test_after_a_rollback_the_version_before_is_the_resident(
    run_rig: RunRig, weights: Weights, tmp_path: Path
) -> None:
    async def test(rig: Rig) -> None:
        releases = await make_staged_resident(rig, tmp_path)
        merged = rig.server.gate.weights
        await releases.rollback("v1", "it is worse")
        await rig.server.chooser.look()
        await until(lambda: rig.server.gate.weights != merged)
        assert await ask(rig, "v1", weights) == (["v1"], "merged")
        assert VariantControl(rig.server).engine().resident == "v1"

    run_rig(test)


def test_a_staged_version_whose_variant_is_gone_is_given_up(
    run_rig: RunRig, weights: Weights, tmp_path: Path
) -> None:
    async def test(rig: Rig) -> None:
        releases = await make_staged_resident(rig, tmp_path)
        await releases.rollback("v1", "it is worse")
        await rig.server.unregister("v1", drain=True)
        await rig.server.chooser.look()
        assert (rig.server.residents.wanted, rig.server.residents.why) == (None, "gone")

    run_rig(test)


def test_requests_for_swapped_variants_are_not_metered(run_rig: RunRig, weights: Weights) -> None:
    """They never run beside others, so that they say nothing of the steps that these share."""

    async def test(rig: Rig) -> None:
        rig.server._choosing.cancel()
        for name in ("whole", "v3", "base"):
            await ask(rig, name, weights)
        assert {name for name, _ in rig.server.demand.used.values()} == {"v3", "base"}

    run_rig(test)


def test_a_resident_gives_way_to_variants_that_are_asked_for(
    run_rig: RunRig, weights: Weights, tmp_path: Path
) -> None:
    """As much memory as two variants that take turns need is enough beside a resident, too."""
    shutil.copytree(weights.tasks.parent / "merged-v3", tmp_path / "tasks" / "other")

    async def test(rig: Rig) -> None:
        await until(lambda: rig.server.residents.in_engine is not None)
        for name in ("whole", "other", "v2", "other", "whole"):
            found, _ = await ask(rig, name, weights)
            assert {"whole": "v2", "other": "v3"}.get(name, name) in found
        assert rig.server.chooser._barred.keys() == {"v1"}  # or it would be evaluated again and again

    run_rig(test, resident="v1", host_cache=2 * SIZE)


def test_after_a_failure_the_next_attempt_is_not_taken_back(run_rig: RunRig, weights: Weights) -> None:
    """Though it takes longer than the time between two looks."""

    async def test(rig: Rig) -> None:
        server, chooser = rig.server, rig.server.chooser
        server._choosing.cancel()
        rig.engine.fail("apply")
        await chooser._become("v2", "saves")
        await until(lambda: any(one.error for one in server.driver.history.latest()))
        await chooser.look()
        assert server.residents.wanted is None
        chooser._barred.clear()  # as a minute later
        task = asyncio.current_task()
        async with server.serving("base", task.cancel):
            await chooser._become("v2", "saves")
            await until(lambda: server.driver.state == "swapping")  # it waits for the request
            await chooser.look()
        merged = (await rig.server.prepare("v2")).merged.digest
        await until(lambda: server.gate.weights == merged)
        await chooser.look()
        await asyncio.sleep(0.05)
        assert (server.residents.wanted.name, server.gate.weights) == ("v2", merged)

    run_rig(test)


def test_a_resident_of_before_is_wanted_again_only_if_it_is_kept(run_rig: RunRig, weights: Weights) -> None:
    """Its weights were dropped while a swapped variant had the engine, and the change to another resident failed."""

    async def test(rig: Rig) -> None:
        server = rig.server
        server._choosing.cancel()
        await server.chooser._become("v1", "saves")
        await until(lambda: server.residents.in_engine is not None)
        await ask(rig, "whole", weights)
        await server.chooser._become("v2", "saves")
        server.residents.settle(server.gate.weights)  # as after a failure
        server.residents.want(server.residents.in_engine, "failed")
        assert await asyncio.wait_for(ask(rig, "v3", weights), 10) == (["v3"], "lora")

    run_rig(test)
