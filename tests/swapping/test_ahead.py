"""What is done before a swap: W0 on the devices is tested, and variants that are likely next are fetched."""

import asyncio
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import Counter
from support.server.fake_engine import FakeEngine
from support.server.rig import SIZE, Rig, RunRig, make_weights, rig_runner, until
from support.server.weights import Weights, other_theta

from peanut_serve.errors import VariantError
from peanut_serve.swapping import metrics
from peanut_serve.swapping.ahead.staging import expected_next
from peanut_serve.swapping.checks.self_test import SelfTestError
from peanut_serve.swapping.policy import Policy, Queue, View
from peanut_serve.swapping.swappable import make_swappable
from peanut_serve.variants.on_device.places import KeptTensor, UpdatedTensor
from peanut_serve.variants.reading import VersionReader

FACTORED = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("ahead"))


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    """Each test changes its own copy of the variants."""
    shutil.copytree(weights.tasks, tmp_path / "tasks", dirs_exist_ok=True)
    run = rig_runner(weights, tmp_path, monkeypatch)
    return lambda test, **options: run(test, **{"roots": (str(tmp_path / "tasks"),), **options})


def counted(counter: Counter) -> float:
    return next(sample.value for sample in counter.collect()[0].samples if sample.name.endswith("_total"))


def staged() -> tuple[float, float]:
    return counted(metrics.STAGED.labels("used")), counted(metrics.STAGED.labels("unused"))


def test_the_next_variant() -> None:
    view, policy = View(10.0, "a", 0.0, 4, (), 1.0), Policy(max_wait=10.0, min_dwell=0.0)
    assert expected_next(view, policy) is None
    assert expected_next(replace(view, queues=(Queue("b", (9.0,)),)), policy) == "b"
    two = (Queue("b", (9.5,)), Queue("c", (9.0, 9.0, 9.0)))
    assert expected_next(replace(view, queues=two), policy) == "c"  # its waiting pays for the swap first
    assert expected_next(replace(view, queues=(Queue("a", (9.0,)),)), policy) is None


@pytest.mark.parametrize("base_copy", ["host", "device"])
def test_the_next_variant_is_staged(run_rig: RunRig, base_copy: str) -> None:
    async def test(rig: Rig) -> None:
        before = staged()
        rig.engine.go.clear()
        running = await rig.asking("v1")
        waiting = await rig.asking("v2")
        await until(lambda: rig.engine.staged)
        assert rig.engine.staged == [[f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "kqv"]]
        await asyncio.sleep(0.1)
        assert len(rig.engine.staged) == 1  # once
        rig.engine.go.set()
        await asyncio.gather(running, waiting)
        assert staged() == (before[0] + 1, before[1])

    run_rig(test, base_copy=base_copy, max_wait=60, drain_timeout=60)


def test_a_wrong_guess_is_harmless(run_rig: RunRig) -> None:
    """The client of what was staged leaves, and another variant is swapped to."""

    async def test(rig: Rig) -> None:
        before = staged()
        rig.engine.go.clear()
        running, leaving = await rig.asking("v1"), await rig.asking("v2")
        await until(lambda: rig.engine.staged)
        leaving.cancel()
        await asyncio.wait([leaving])
        waiting = await rig.asking("v3")
        await until(lambda: len(rig.engine.staged) == 2)
        rig.engine.go.set()
        await asyncio.gather(running, waiting)
        assert staged() == (before[0] + 1, before[1] + 1)

    run_rig(test, base_copy="device", max_wait=60, drain_timeout=60, min_dwell=2)


def test_staging_that_fails_is_done_by_the_swap(run_rig: RunRig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        tried: list[object] = []

        async def fail(places: object) -> None:
            tried.append(places)
            raise RuntimeError("no memory")

        monkeypatch.setattr(rig.engine, "stage", fail)
        rig.engine.go.clear()
        running, waiting = await rig.asking("v1"), await rig.asking("v2")
        await until(lambda: tried)
        rig.engine.go.set()
        await asyncio.gather(running, waiting)

    run_rig(test, base_copy="device", max_wait=60, drain_timeout=60)


def cached(rig: Rig) -> set[str]:
    names = {found: name for name in ("v1", "v2", "v3") if (found := rig.server.catalogue.find(name).version)}
    return {name for version, name in names.items() if rig.server.cache.get(version.digest) is not None}


def test_a_new_version_is_evaluated_while_the_server_is_idle(run_rig: RunRig, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        for name in ("v1", "v2"):
            await rig.ask(name)
        before = rig.server.catalogue.find("v2").version
        await rig.server._recent.prepare()
        assert rig.server.catalogue.find("v2").version is before  # nothing to do
        ahead = counted(metrics.PREPARED_AHEAD)
        other_theta(tmp_path / "tasks" / "v2", tmp_path / "new")
        shutil.rmtree(tmp_path / "tasks" / "v2")
        (tmp_path / "new").rename(tmp_path / "tasks" / "v2")
        await rig.server._recent.prepare()
        after = rig.server.catalogue.find("v2").version
        assert before is not None
        assert after is not None
        assert after.digest != before.digest
        assert rig.server.cache.get(after.digest) is not None
        assert counted(metrics.PREPARED_AHEAD) == ahead + 1
        assert rig.server.usage["v2"].requests == 1

    run_rig(test)


def test_only_free_memory_is_used(run_rig: RunRig) -> None:
    """Of two variants that were used, the cache has the one that was used last; the other one waits for room."""

    async def test(rig: Rig) -> None:
        for name in ("v1", "v2"):
            await rig.ask(name)
        await rig.ask("base")
        await rig.ask("v3")  # the active one is held: others are dropped
        assert cached(rig) == {"v2", "v3"}
        await rig.server._recent.prepare()
        assert cached(rig) == {"v2", "v3"}
        found = rig.server.catalogue.find("v2").version
        assert found is not None
        rig.server.cache.drop(found.digest)
        await rig.server._recent.prepare()
        assert cached(rig) == {"v2", "v3"}  # v2 was used after v1
        await rig.ask("v1")  # what was not prepared ahead is prepared for a request

    run_rig(test, host_cache=2 * SIZE)


def test_a_busy_server_prepares_nothing_ahead(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("v1")
        found = rig.server.catalogue.find("v1").version
        assert found is not None
        await rig.ask("base")
        rig.server.cache.drop(found.digest)
        rig.engine.go.clear()
        running = await rig.asking("base")
        await rig.server._recent.prepare()
        assert cached(rig) == set()
        rig.engine.go.set()
        await running
        await rig.server._recent.prepare()
        assert cached(rig) == {"v1"}

    run_rig(test)


def test_a_variant_that_fails_is_tried_once_for_each_use(
    run_rig: RunRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("v1")
        file = tmp_path / "tasks" / "v1" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        looks, look = [], VersionReader.look
        monkeypatch.setattr(VersionReader, "look", lambda *args: looks.append(args) or look(*args))
        for _ in range(3):
            await rig.server._recent.prepare()
        assert len(looks) == 1

    run_rig(test)


async def checked(weights: Weights, engine: FakeEngine) -> None:
    await make_swappable(engine, weights.base, "device")


def test_copies_are_tested_at_the_start(weights: Weights) -> None:
    engine = FakeEngine(weights.base)
    asyncio.run(checked(weights, engine))
    assert engine.violations == []
    assert engine.weights == weights.expected["base"]


@pytest.mark.parametrize(
    ("kind", "when"),
    [
        (KeptTensor, "restored from W0 on the device"),
        (UpdatedTensor, "updated on the device, from that of the host's"),
    ],
)
def test_copies_that_are_wrong_are_found(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, kind: type, when: str
) -> None:
    """An engine that loads something else than the copies, or the updates, does not serve."""
    engine = FakeEngine(weights.base)
    apply = engine.apply

    async def wrong(places: list, afresh: bool = False) -> None:
        await apply(places)
        for place in places:
            if isinstance(place, kind):
                engine.weights[place.name] = bytes(len(engine.weights[place.name]))

    monkeypatch.setattr(engine, "apply", wrong)
    with pytest.raises(SelfTestError, match=when):
        asyncio.run(checked(weights, engine))


def test_a_device_without_memory(weights: Weights, caplog: pytest.LogCaptureFixture) -> None:
    """For one layer, it does not start; for some of them, it warns at the start, and says so when a variant comes."""
    engine = FakeEngine(weights.base)
    engine.free = 100
    sentence = "--base-copy device needs 0 MiB more on fake .* but 0 MiB are free; lower --gpu-memory-utilization"
    with pytest.raises(VariantError, match=sentence):
        asyncio.run(checked(weights, engine))

    async def test() -> None:
        engine = FakeEngine(weights.base)
        engine.free = 60_000
        with caplog.at_level(logging.WARNING, "vllm.peanut_serve"):
            swappable = await make_swappable(engine, weights.base, "device")
        assert "if variants change all layers: --base-copy device needs" in caplog.text
        copies = swappable.copies
        assert copies is not None
        engine.free = 5000
        names = swappable.model.with_neighbours([FACTORED])
        with pytest.raises(VariantError, match="for W0 of what variants change"):
            await copies.prepare(names)
        assert not copies.kept.keys() & names
        engine.free = 1 << 20
        await copies.prepare(names)
        assert copies.kept.keys() >= {*names}

    asyncio.run(test())
