"""What the metrics tell of the engine, read as inference gateways read it (`support/server/gateway.py`)."""

import asyncio
import shutil
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from support.server.gateway import Endpoint, read_endpoint, read_queue, samples_of
from support.server.rig import SIZE, SLOTS, Rig, RunRig, make_weights, rig_runner, until
from support.server.weights import Weights

from peanut_serve.swapping import metrics


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("residency"))


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    """Each test changes its own copy of the variants."""
    shutil.copytree(weights.tasks, tmp_path / "tasks", dirs_exist_ok=True)
    run = rig_runner(weights, tmp_path, monkeypatch)
    return lambda test, **options: run(test, **{"roots": (str(tmp_path / "tasks"),), **options})


async def scrape(rig: Rig) -> str:
    await rig.server.observe()
    registry = CollectorRegistry()
    registry.register(metrics.STATE)
    return generate_latest(registry).decode()


async def seen(rig: Rig) -> Endpoint:
    """The server as a gateway sees it; there is one sample, so nothing that was true before can win."""
    text = await scrape(rig)
    assert len(samples_of(text, "vllm:lora_requests_info")) == 1
    return read_endpoint(text)


def told(active: set[str], most: int, waiting: set[str] = frozenset()) -> Endpoint:
    return Endpoint(frozenset(active), frozenset(waiting), most)


def test_merged_mode(run_rig: RunRig) -> None:
    """The resident variant is running under all of its names, others wait, and there is never room for another."""

    async def test(rig: Rig) -> None:
        assert await seen(rig) == told({"base"}, 1)
        rig.engine.go.clear()
        running, waiting = await rig.asking("base"), [await rig.asking(name) for name in ("v1", "v2", "v1")]
        endpoint = await seen(rig)
        assert endpoint == told({"base"}, 1, {"v1", "v2"})
        assert [endpoint.score(name) for name in ("base", "v1", "v3")] == [1.0, 0.6, 0.0]
        assert read_queue(await scrape(rig), "peanut_queued_requests") == 3
        rig.engine.go.set()
        await asyncio.gather(running, *waiting)
        await rig.server.register("alias", "v1")
        await rig.ask("v1")
        endpoint = await seen(rig)
        assert endpoint == told({"v1", "alias"}, 1)
        assert [endpoint.score(name) for name in ("v1", "alias", "v2")] == [1.0, 1.0, 0.0]
        text = await scrape(rig)
        assert samples_of(text, "peanut_resident_variant") == [({"variant": "v1"}, 1), ({"variant": "alias"}, 1)]
        assert samples_of(text, "peanut_loaded_adapter") == []
        sizes = {labels["variant"]: size for labels, size in samples_of(text, "peanut_variant_host_bytes")}
        assert sizes == {"v1": SIZE, "v2": SIZE, "alias": SIZE}

    run_rig(test)


def test_lora_mode(run_rig: RunRig) -> None:
    """As vLLM's own metric: adapters only, as many as there are slots; but one that is loaded and idle counts."""

    async def test(rig: Rig) -> None:
        assert await seen(rig) == told(set(), SLOTS)
        for name in ("v1", "v2", "v3"):
            async with rig.server.serving(name, lambda: None):
                assert name in (await seen(rig)).active
        assert await seen(rig) == told({"v2", "v3"}, SLOTS)
        async with AsyncExitStack() as running:
            for name in ("v1", "v2", "v3"):
                await running.enter_async_context(rig.server.serving(name, lambda: None))
            assert await seen(rig) == told({"v1", "v2"}, SLOTS, {"v3"})
            assert [rig.server.facts(name).running for name in ("base", "v1", "v2")] == [0, 1, 1]
        text = await scrape(rig)
        assert samples_of(text, "peanut_resident_variant") == [({"variant": "base"}, 1)]
        assert {labels["variant"] for labels, _ in samples_of(text, "peanut_loaded_adapter")} == {"v1", "v2"}
        rig.engine.die()
        await until(lambda: rig.server.swapper.restarts == 1 and rig.server.is_ready)
        assert await seen(rig) == told(set(), SLOTS)

    run_rig(test, mode="lora")


def test_auto_mode(run_rig: RunRig, weights: Weights, tmp_path: Path) -> None:
    """With the weights of the base there are slots beside it; with others, a request for an adapter needs a swap."""
    shutil.copytree(weights.tasks.parent / "merged-v2", tmp_path / "tasks" / "whole")

    async def test(rig: Rig) -> None:
        async with rig.server.serving("v1", lambda: None):
            endpoint = await seen(rig)
            assert endpoint == told({"base", "v1"}, 1 + SLOTS)
            assert [endpoint.score(name) for name in ("base", "v1", "v3")] == [1.0, 1.0, 0.8]
            waiting = await rig.asking("whole")
            assert await seen(rig) == told({"base", "v1"}, 1 + SLOTS, {"whole"})
        await waiting
        endpoint = await seen(rig)
        assert endpoint == told({"whole"}, 1)
        assert [endpoint.score(name) for name in ("whole", "base", "v1")] == [1.0, 0.0, 0.0]
        await rig.ask("base")
        assert await seen(rig) == told({"base", "v1"}, 1 + SLOTS)  # its slot has kept it

    weights.expected["whole"] = weights.expected["v2"]
    run_rig(test, mode="auto")


def test_a_server_without_an_engine_attracts_nobody(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.fail("restart", "raise", *range(1, 6))
        rig.engine.die()
        await until(lambda: rig.server.driver.state == "failed")
        endpoint = await seen(rig)
        assert (endpoint, endpoint.score("base")) == (told(set(), 0), 0.0)

    for mode in ("merged", "lora", "auto"):
        run_rig(test, mode=mode)


def test_names_that_are_gone_and_unknown_ones_are_not_told(run_rig: RunRig, tmp_path: Path) -> None:
    """Although nobody lists the variants: whoever reads the metrics does."""

    async def test(rig: Rig) -> None:
        await rig.ask("v1")
        metrics.REQUESTS.labels("v1", "200").inc()
        with pytest.raises(Exception, match="there is no variant"):
            await rig.ask("stranger")
        assert (await seen(rig)).active == {"v1"}
        assert rig.server._preparation.asked == {}
        await rig.ask("base")
        shutil.rmtree(tmp_path / "tasks" / "v1")
        rig.server.catalogue._listing.renew()
        text = await scrape(rig)
        assert "stranger" not in text
        assert '"v1"' not in text  # although the host cache has its weights
        assert rig.server.cache.nbytes == SIZE
        samples = [sample for family in metrics.REQUESTS.collect() for sample in family.samples]
        assert "v1" not in {sample.labels["variant"] for sample in samples}

    run_rig(test)


def test_names_that_go_while_they_are_used(run_rig: RunRig, tmp_path: Path) -> None:
    """Their series end after the last request, however they were removed."""

    def told_of(name: str) -> bool:
        families = [metric.collect() for metric in (metrics.QUEUE_SECONDS, metrics.SWAPS)]
        samples = [sample for found in families for family in found for sample in family.samples]
        return name in {sample.labels["variant"] for sample in samples}

    async def test(rig: Rig) -> None:
        async with rig.server.serving("v1", lambda: None):
            await scrape(rig)
            shutil.rmtree(tmp_path / "tasks" / "v1")
            rig.server.catalogue._listing.renew()
            await scrape(rig)
            assert told_of("v1")
        await scrape(rig)
        assert not told_of("v1")
        assert "v1" not in rig.server.driver.usage
        await rig.server.unregister("v2", False)
        rig.server._record_use("v2", 0.0)  # by a request that was being prepared
        assert told_of("v2")
        await scrape(rig)
        assert not told_of("v2")

    run_rig(test)


def test_alive_until_the_engine_cannot_be_started(run_rig: RunRig) -> None:
    """The server restarts the engine; after some attempts in vain, a restart of the server is the cure."""

    async def test(rig: Rig) -> None:
        driver = rig.server.driver
        rig.engine.fail("restart", "raise", *range(1, 6))
        rig.engine.die()
        rig.server.driver.notice_death()
        assert (rig.server.is_alive, rig.server.is_ready) == (True, False)
        await until(lambda: driver.failed_starts == 4)
        assert (rig.server.is_alive, rig.server.is_ready) == (True, False)
        await until(lambda: driver.failed_starts == 5)
        assert not rig.server.is_alive
        await until(lambda: rig.server.is_ready)  # it does not give up
        assert (rig.server.is_alive, driver.failed_starts) == (True, 0)
        rig.server.stop()
        assert (rig.server.is_alive, rig.server.is_ready) == (True, False)  # it ends by itself

    run_rig(test)


def test_a_server_whose_driver_ended_is_not_alive(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        driving = rig.server._driving
        assert driving is not None
        driving.cancel()
        await asyncio.wait([driving])
        assert not rig.server.is_alive

    run_rig(test)
