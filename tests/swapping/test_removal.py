"""A variant is removed with its last request, and no later: what its requests may take is bounded."""

import asyncio
from pathlib import Path

import pytest
from support.server.rig import Rig, RunRig, make_weights, rig_runner, until
from support.server.weights import Weights

from peanut_serve.errors import UnknownVariantError, VariantInUseError
from peanut_serve.swapping import operating


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("removal"))


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    return rig_runner(weights, tmp_path, monkeypatch)


def test_a_name_that_comes_back_does_not_hold_up_its_removal(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await rig.server.register("new", "v1")
        rig.engine.go.clear()
        old = await rig.asking("new")
        with pytest.raises(VariantInUseError, match="new has 1 requests; wait for them with drain=true"):
            await rig.server.unregister("new", drain=False)
        removing = asyncio.create_task(rig.server.unregister("new", drain=True))
        await until(lambda: not rig.server.has("new"))
        await rig.server.register("new", "v1")
        ended = asyncio.Event()

        async def long_request() -> None:
            async with rig.server.serving("new", ended.set):
                rig.server.record_end("new", "200", 0.1)
                await ended.wait()

        later = asyncio.create_task(long_request())
        await until(lambda: "new" in rig.server.usage and rig.server.usage["new"].answered > 0)
        rig.engine.go.set()
        await old
        await removing  # while the later request runs
        assert not later.done()
        assert rig.server.usage["new"].answered == 1, "what was counted for the new one is kept"
        ended.set()
        await later

    run_rig(test)


def test_requests_that_outlast_a_removal_are_aborted(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await rig.server.register("new", "v1")
        rig.engine.go.clear()
        running = await rig.asking("new")
        await until(lambda: bool(rig.server.gate.running))
        await rig.server.unregister("new", drain=True)
        with pytest.raises(asyncio.CancelledError):
            await running

    run_rig(test, drain_timeout=0.05)


def test_requests_that_wait_are_refused_when_a_removal_takes_too_long(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await rig.server.register("new", "v1")
        await rig.ask("base")
        ended = asyncio.Event()

        async def long_request() -> None:
            async with rig.server.serving("base", lambda: None):
                await ended.wait()

        running = asyncio.create_task(long_request())
        await until(lambda: bool(rig.server.gate.running))
        rig.server.driver.stop()  # so that nothing is swapped
        waiting = await rig.asking("new")
        await rig.server.unregister("new", drain=True)
        with pytest.raises(UnknownVariantError, match="new was removed while the request waited"):
            await waiting
        ended.set()
        await running

    run_rig(test, drain_timeout=0.05)


def test_a_removal_ends_though_an_aborted_request_does_not(run_rig: RunRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operating, "ABORT_SECONDS", 0.05)

    async def test(rig: Rig) -> None:
        ended = asyncio.Event()

        async def deaf_request() -> None:
            async with rig.server.serving("v2", lambda: None):
                await ended.wait()

        running = asyncio.create_task(deaf_request())
        await until(lambda: bool(rig.server.gate.running))
        await rig.server.unregister("v2", drain=True)
        assert not running.done()
        ended.set()
        await running

    run_rig(test, drain_timeout=0.05)
