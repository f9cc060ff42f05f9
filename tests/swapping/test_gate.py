"""Each request is answered with the weights of its variant, even if swaps fail or clients disconnect."""

import asyncio
import random
from collections.abc import Awaitable, Iterable
from pathlib import Path

import pytest
from support.server.fake_engine import FaultError
from support.server.rig import NAMES, SIZE, Rig, RunRig, make_weights, rig_runner, until
from support.server.weights import Weights

from peanut_serve.errors import EngineDownError, QueueFullError, SwapError
from peanut_serve.swapping import history as swap_history
from peanut_serve.variants.host_cache import BaseWeights
from peanut_serve.variants.host_weights import HostWeights
from peanut_serve.variants.version import Version
from peanut_serve.web.operator import VariantControl
from peanut_serve.web.schema import VariantState


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("serving"))


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    return rig_runner(weights, tmp_path, monkeypatch)


def test_every_request_gets_the_weights_of_its_variant(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        names = list(NAMES * 20)
        random.Random(0).shuffle(names)
        await asyncio.gather(*map(rig.ask, names))
        for name in names:
            await rig.ask(name)
        assert rig.server.usage["v1"].requests == 40

    run_rig(test)


def test_requests_of_a_variant_go_together(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        tasks = [await rig.asking(name) for name in NAMES * 10]
        rig.engine.go.set()
        await asyncio.gather(*tasks)
        assert rig.swaps <= len(NAMES)

    run_rig(test, max_wait=60)


def test_a_client_that_disconnects_makes_room_for_another(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        running = await rig.asking("base")
        waiting = [await rig.asking("v1"), await rig.asking("v2")]
        with pytest.raises(QueueFullError, match="2 requests are waiting, and --max-queue is 2") as full:
            await rig.ask("v1")
        assert full.value.retry_after >= 1
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        other = await rig.asking("v3")
        assert (rig.waiting, rig.server.places.taken, other.done()) == (2, 2, False)
        rig.engine.go.set()
        await asyncio.gather(running, waiting[1], other)
        assert (rig.waiting, rig.server.places.taken, rig.server.in_flight) == (0, 0, {})

    run_rig(test, max_queue=2)


@pytest.mark.parametrize("options", [{"drain": "abort"}, {"drain_timeout": 0.01}])
def test_a_swap_aborts_requests_that_run_too_long(run_rig: RunRig, options: dict) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        running = await rig.asking("base")
        waiting = await rig.asking("v1")
        with pytest.raises(asyncio.CancelledError):
            await running
        rig.engine.go.set()
        await waiting

    run_rig(test, **options)


def test_a_swap_waits_for_the_requests_it_aborts_to_end(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        async def slow() -> None:
            ended = asyncio.Event()
            async with rig.server.serving("base", ended.set):
                rig.engine.running += 1  # a violation if the engine is paused meanwhile
                await ended.wait()
                for _ in range(100):
                    await asyncio.sleep(0)
                rig.engine.running -= 1

        await asyncio.gather(slow(), rig.ask("v1"))

    run_rig(test, drain="abort")


def test_a_failed_swap_fails_only_its_own_requests(run_rig: RunRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_history, "_FIRST_RETRY", 60.0)

    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        rig.engine.fail("apply", "half", 1)
        running = await rig.asking("base")
        tasks = [await rig.asking(name) for name in ("v1", "v1", "base", "v2")]
        rig.engine.go.set()
        ended = await asyncio.gather(running, *tasks, return_exceptions=True)
        assert [type(end).__name__ for end in ended] == ["NoneType", "SwapError", "SwapError", "NoneType", "NoneType"]
        before = rig.swaps
        with pytest.raises(SwapError, match=r"halfway; try again after \d+ s, or reload the variant"):
            await rig.ask("v1")
        assert rig.swaps == before
        control = VariantControl(rig.server)
        assert control.variant("v1").state is VariantState.FAILED
        await control.reload("v1")
        await rig.ask("v1")
        assert control.variant("v1").state is VariantState.ACTIVE

    run_rig(test)


def test_an_engine_that_dies_while_requests_wait(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("v1")
        rig.engine.go.clear()
        running = await rig.asking("v1")
        waiting = [await rig.asking("v2"), await rig.asking("v1")]
        rig.engine.die()
        assert not rig.server.is_ready
        with pytest.raises(FaultError):
            await running
        await asyncio.gather(*waiting)
        assert (rig.server.swapper.restarts, rig.server.is_ready) == (1, True)

    run_rig(test, max_wait=60)


@pytest.mark.parametrize("how", ["raise", "wrong"])
def test_an_engine_that_does_not_restart_is_retried_until_it_does(run_rig: RunRig, how: str) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.fail("restart", how, 1, 2)
        rig.engine.go.clear()
        running = await rig.asking("base")
        waiting = await rig.asking("v1")
        rig.engine.die()
        ended = await asyncio.gather(running, waiting, return_exceptions=True)
        assert [type(end) for end in ended] == [FaultError, EngineDownError]
        with pytest.raises(EngineDownError, match="the engine is down: .*restarting it failed"):
            await rig.ask("base")
        await until(lambda: rig.server.is_ready)
        await rig.ask("v1")
        assert rig.server.swapper.restarts == 3

    run_rig(test, max_wait=60)


def test_a_server_that_stops(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        running = await rig.asking("base")
        waiting = await rig.asking("v1")
        rig.server.stop()
        for refused in (waiting, rig.ask("base"), rig.server.activate("v1")):
            with pytest.raises(EngineDownError, match="the server is stopping"):
                await refused
        rig.engine.go.set()
        await running
        assert not rig.server.is_ready

    run_rig(test, max_wait=60)


@pytest.mark.parametrize("steps", range(5))
def test_a_server_that_stops_during_another_event(run_rig: RunRig, steps: int) -> None:
    """`asyncio.wait_for` may lose a cancellation then. An engine that is shut down must not be restarted."""

    async def test(rig: Rig) -> None:
        await asyncio.sleep(0.001)
        rig.server.driver.wake()
        for _ in range(steps):
            await asyncio.sleep(0)
        rig.server.stop()
        rig.engine.die()
        await asyncio.sleep(0.05)
        assert rig.server.swapper.restarts == 0

    run_rig(test)


def test_a_request_prepares_its_variant_once(run_rig: RunRig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        digests: list[str] = []
        load = rig.server.cache.load

        def counting(version: Version, drops: bool = True) -> Awaitable[HostWeights]:
            digests.append(version.digest)
            return load(version, drops)

        monkeypatch.setattr(rig.server.cache, "load", counting)
        for requests in (1, 2):  # the first moves the name to the version, the second finds it unchanged
            await rig.ask("v1")
            assert digests == [rig.actives[-1]] * requests

    run_rig(test)


def test_weights_are_held_before_they_are_prepared(run_rig: RunRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights may replace them in host memory while W0 is copied."""

    async def test(rig: Rig) -> None:
        prepare = BaseWeights.prepare

        async def slow(base: BaseWeights, names: Iterable[str]) -> None:
            await prepare(base, names)
            monkeypatch.setattr(BaseWeights, "prepare", prepare)
            for name in ("v2", "v3", "v2"):
                await rig.server.prepare(name)

        monkeypatch.setattr(BaseWeights, "prepare", slow)
        await rig.ask("v1")

    run_rig(test, host_cache=2 * SIZE)
