"""The cache of evaluated weights: evaluated once, bounded, never dropped during a swap, and nothing leaks."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.server.fake_engine import read
from support.tiny_models import Pair, edit_weights

from converters.errors import CheckpointError
from converters.files.header import TensorSpec
from converters.models.checkpoint import Checkpoint, open_checkpoint
from peanut_serve.variants import host_cache, host_weights
from peanut_serve.variants.evaluations import Evaluations
from peanut_serve.variants.host_cache import BaseWeights, HostCache
from peanut_serve.variants.host_weights import HostMemoryError, HostWeights
from peanut_serve.variants.opening import VersionOpener, adapter_version
from peanut_serve.variants.version import LoadedModel, VariantKind, Version

MIB = 1 << 20
SIZES = {"a": 1, "b": 1, "c": 1, "d": 1, "large": 3}  # MiB


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Counted:
    """Versions that count their evaluations, and can be made to wait or fail."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fails: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.may_end = threading.Event()
        self.may_end.set()

    def version(self, name: str) -> Version:
        def write(into: HostWeights) -> None:
            self.log.append(name)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            assert self.may_end.wait(60)
            self.at_once -= 1
            if name in self.fails:
                raise CheckpointError(f"{name} is broken")
            into.put("w", torch.full((SIZES[name] * MIB // 4,), float(len(name))))

        return Version(
            name, VariantKind.ADAPTER, (TensorSpec("w", "F32", (SIZES[name] * MIB // 4,), SIZES[name] * MIB),), write
        )


@pytest.fixture
def evaluations() -> Counted:
    return Counted()


def run(test: Callable[[HostCache], Awaitable[None]], limit: int = 3 * MIB) -> None:
    """Run a test on a cache; check that only the weights in it have open descriptors."""

    async def call() -> None:
        before, cache = open_files(), HostCache(limit, Evaluations(64))
        await test(cache)
        assert open_files() == before + len(held(cache))
        cache.close()
        assert open_files() == before

    asyncio.run(call())


def held(cache: HostCache) -> set[str]:
    return {name for name in SIZES if cache.get(name) is not None}


def test_concurrent_loads_share_one_evaluation(evaluations: Counted) -> None:
    async def test(cache: HostCache) -> None:
        wanted = [evaluations.version(name) for name in "aabab"]
        found = await asyncio.gather(*map(cache.load, wanted))
        assert sorted(evaluations.log) == ["a", "b"]
        assert evaluations.most_at_once == 1  # an evaluation uses memory and all cores
        assert found[0] is found[1] is found[3] is cache.get("a")
        assert cache.nbytes == 2 * MIB

    run(test)


def test_cached_weights_do_not_wait_for_an_evaluation(evaluations: Counted) -> None:
    async def test(cache: HostCache) -> None:
        ready = await cache.load(evaluations.version("a"))
        evaluations.may_end.clear()
        evaluating = asyncio.create_task(cache.load(evaluations.version("b")))
        while evaluations.at_once == 0:
            await asyncio.sleep(0.001)
        assert await cache.load(evaluations.version("a")) is ready
        assert not evaluating.done()
        evaluations.may_end.set()
        await evaluating

    run(test)


def test_the_least_recently_used_is_dropped_first(evaluations: Counted) -> None:
    async def test(cache: HostCache) -> None:
        for name in "abcad":
            await cache.load(evaluations.version(name))
        assert held(cache) == {"a", "c", "d"}
        assert cache.nbytes == 3 * MIB
        evaluations.fails.add("large")
        with pytest.raises(CheckpointError):
            await cache.load(evaluations.version("large"))
        assert held(cache) == set()  # dropped to make room

    run(test)


def test_held_and_pinned_weights_are_kept(evaluations: Counted) -> None:
    async def test(cache: HostCache) -> None:
        for name in "abc":
            await cache.load(evaluations.version(name))
        cache.pin("a", True)
        with cache.holding("b"), cache.holding("b"):
            with pytest.raises(HostMemoryError, match="3 MiB, but --host-cache is 3 MiB, and 2 MiB of it are in use"):
                await cache.load(evaluations.version("large"))
            assert held(cache) == {"a", "b", "c"}  # nothing is dropped on failure
            cache.drop("b")
            assert cache.get("b") is not None
        with pytest.raises(HostMemoryError, match="and 1 MiB of it"):
            await cache.load(evaluations.version("large"))
        cache.pin("a", False)
        await cache.load(evaluations.version("large"))
        assert held(cache) == {"large"}
        cache.pin("large", True)
        cache.drop("large")  # a pin does not hold it
        assert held(cache) == set()

    run(test)


def test_weights_larger_than_the_cache(evaluations: Counted) -> None:
    async def test(cache: HostCache) -> None:
        with pytest.raises(HostMemoryError, match="take 3 MiB, but --host-cache is 2 MiB"):
            await cache.load(evaluations.version("large"))
        assert evaluations.log == []

    run(test, limit=2 * MIB)


def test_a_failure_leaves_nothing(evaluations: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(cache: HostCache) -> None:
        evaluations.fails.add("a")
        for _ in range(3):
            with pytest.raises(CheckpointError, match="a is broken"):
                await cache.load(evaluations.version("a"))
        with monkeypatch.context() as patch:
            patch.setattr(host_weights, "available_memory", lambda: 0)
            with pytest.raises(HostMemoryError, match="0 MiB are free"):
                await cache.load(evaluations.version("b"))
        assert (held(cache), cache.nbytes) == (set(), 0)
        evaluations.fails.clear()
        await cache.load(evaluations.version("a"))
        assert held(cache) == {"a"}

    run(test)


def test_a_load_can_be_cancelled_during_evaluation(evaluations: Counted) -> None:
    """The thread cannot be cancelled: its weights are kept, and no other evaluation runs at the same time."""

    async def test(cache: HostCache) -> None:
        evaluations.may_end.clear()
        cancelled = asyncio.create_task(cache.load(evaluations.version("a")))
        while not evaluations.log:
            await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        others = [asyncio.create_task(cache.load(evaluations.version(name))) for name in "ab"]
        await asyncio.sleep(0)
        evaluations.may_end.set()
        await asyncio.gather(*others)
        assert (sorted(evaluations.log), evaluations.most_at_once) == (["a", "b"], 1)
        assert held(cache) == {"a", "b"}

    run(test)


def test_real_weights(pair: Pair) -> None:
    base = open_checkpoint(pair.base)
    model = LoadedModel(base, [[name] for name in base.tensors])
    version = replace(adapter_version("v", pair.adapter, VersionOpener(model, "cpu")), digest="a")

    async def test(cache: HostCache) -> None:
        weights = await cache.load(version)
        assert set(weights.tensors) == {spec.name for spec in version.specs}
        assert cache.nbytes == version.nbytes == sum(map(len, read(weights.tensors.values()).values()))

    run(test)


@pytest.fixture
def base(pair: Pair) -> Checkpoint:
    return open_checkpoint(pair.base)


NAMES = ("model.norm.weight", "lm_head.weight")


def test_the_base_is_copied_once(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    copy = host_cache.host_copy
    monkeypatch.setattr(host_cache, "host_copy", lambda of, names: (asked.append(names), copy(of, names))[1])

    async def test() -> None:
        weights = BaseWeights(base, on_host=True)
        places, before = weights.tensors, read(weights.tensors.values())
        wanted = [NAMES[:1], NAMES, NAMES[:1], NAMES]
        await asyncio.gather(*map(weights.prepare, wanted))
        assert asked == [[NAMES[0]], [NAMES[1]]]
        assert weights.nbytes == sum(base.tensors[name].nbytes for name in NAMES)
        assert weights.tensors is places  # the same mapping, with the copies
        assert [name for name, info in places.items() if info.file.is_relative_to("/proc")] == sorted(NAMES)
        edit_weights(base.folder / "model.safetensors", lambda tensors: {k: v + 1 for k, v in tensors.items()})
        now = read(places.values())
        assert [name for name in before if now[name] == before[name]] == sorted(NAMES)
        await weights.prepare(NAMES)  # already copied
        with pytest.raises(CheckpointError, match="changed while"):
            await weights.prepare(["model.embed_tokens.weight"])

    asyncio.run(test())


def test_a_base_that_stays_on_disk(base: Checkpoint) -> None:
    async def test() -> None:
        weights = BaseWeights(base, on_host=False)
        await weights.prepare(NAMES)
        assert (weights.nbytes, weights.tensors) == (0, dict(base.tensors))
        edit_weights(base.folder / "model.safetensors", lambda tensors: None)
        with pytest.raises(CheckpointError, match="changed while"):
            await weights.prepare(NAMES)

    asyncio.run(test())


def test_a_load_that_drops_nothing(evaluations: Counted) -> None:
    """It uses free room only; and that it fails is not told to those who may drop others."""

    async def test(cache: HostCache) -> None:
        for name in ("a", "b"):
            await cache.load(evaluations.version(name))
        await cache.load(evaluations.version("c"), drops=False)
        with pytest.raises(HostMemoryError, match="0 MiB of --host-cache 3 MiB are free"):
            await cache.load(evaluations.version("d"), drops=False)
        assert held(cache) == {"a", "b", "c"}
        d = evaluations.version("d")
        refused, found = await asyncio.gather(cache.load(d, drops=False), cache.load(d), return_exceptions=True)
        assert isinstance(refused, HostMemoryError)
        assert found is cache.get("d")
        assert await cache.load(d, drops=False) is found
        assert evaluations.log == ["a", "b", "c", "d"]

    run(test)
