"""A swap is a transaction: after any failure, the engine has the complete weights of a known version.

The engine is a fake: each of its calls has to fail at a chosen moment, in a chosen way, which a real engine cannot be
made to do. The weights are those of real checkpoints, and the oracle is the output of `peanut-merge`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.server.fake_engine import FakeEngine, FaultError, identity
from support.server.weights import Weights, weights_in

from peanut_serve.errors import EngineDownError, SwapError
from peanut_serve.swapping.swappable import make_swappable
from peanut_serve.swapping.transaction import Phase, Report, Swapper

ATTENTION = [f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in range(2) for kind in "kqv"]
FORWARD = ("pause", "apply", "invalidate", "resume", "ask_canary")  # the calls of a swap, in this order


@pytest.fixture(scope="module", params=["host", "device"])
def base_copy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def weights(base_copy: str, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return weights_in(tmp_path_factory.mktemp("weights"), keeps_base=base_copy == "device")


@dataclass(frozen=True)
class Stage:
    """An engine whose weights are swapped."""

    engine: FakeEngine
    swapper: Swapper
    weights: Weights

    async def swap(self, name: str, quiesce: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)) -> Report:
        return await self.swapper.swap(self.weights.versions[name], quiesce)

    async def is_serving(self, name: str) -> None:
        """The engine has all of a variant's weights and answers with them, and no call broke the rules."""
        assert self.swapper.active.version.digest == self.weights.versions[name].version.digest
        assert self.engine.weights == self.weights.expected[name]
        assert self.engine.resumed.is_set()
        assert await self.engine.generate("once upon a time") == identity(self.weights.expected[name])
        assert self.engine.violations == []


RunStage = Callable[..., None]


@pytest.fixture
def run_stage(weights: Weights, base_copy: str) -> RunStage:
    """Runs a test on a new engine."""

    def call(test: Callable[[Stage], Awaitable[None]], active: str = "base", noise: float = 0.0) -> None:
        async def run() -> None:
            engine = FakeEngine(weights.base, noise)
            swappable = await make_swappable(engine, weights.base, base_copy)
            if swappable.copies is not None:
                await swappable.copies.prepare(ATTENTION)
            stage = Stage(engine, swappable.swapper, weights)
            await stage.swap(active)
            await test(stage)

        asyncio.run(run())

    return call


def sent(weights: Weights, name: str, names: list[str]) -> int:
    """Bytes that workers that keep W0 do not have."""
    loaded = weights.versions[name].weights
    places = loaded.places if loaded is not None else {}
    return sum(places[tensor].nbytes for tensor in names if tensor in places)


def test_only_tensors_that_differ_are_loaded(run_stage: RunStage, base_copy: str) -> None:
    async def test(stage: Stage) -> None:
        first = [name for name in ATTENTION if ".0." in name]
        walk = {"v1": ATTENTION, "v2": first, "base": ATTENTION}
        for name, names in [*walk.items(), ("v2", ATTENTION), ("v1", first)]:
            report = await stage.swap(name)
            await stage.is_serving(name)
            assert sorted(stage.engine.applied[-1]) == sorted(names)  # k_proj too: vLLM fuses it with its neighbours
            assert report.tensors == len(names)
            whole = sum(len(stage.weights.expected[name][tensor]) for tensor in names)
            assert report.nbytes == (whole if base_copy == "host" else sent(stage.weights, name, names))
            assert list(report.seconds) == [Phase.QUIESCE, Phase.APPLY, Phase.INVALIDATE, Phase.CHECK]
        assert stage.swapper.restarts == 0

    run_stage(test)


def test_the_same_weights_again_load_nothing(run_stage: RunStage) -> None:
    async def test(stage: Stage) -> None:
        applied = len(stage.engine.applied)
        assert (await stage.swap("v1")).tensors == 0
        assert len(stage.engine.applied) == applied
        await stage.is_serving("v1")

    run_stage(test, active="v1")


@pytest.mark.parametrize(
    ("call", "how"),
    [*((call, "raise") for call in FORWARD), ("apply", "half"), ("apply", "nothing"), ("ask_canary", "nan")],
)
@pytest.mark.parametrize(("old", "new"), [("base", "v1"), ("v1", "v2"), ("v2", "base")])
def test_a_failure_leaves_the_old_weights(run_stage: RunStage, old: str, new: str, call: str, how: str) -> None:
    async def test(stage: Stage) -> None:
        for name in (new, old):  # records their answers
            await stage.swap(name)
        await stage.engine.generate("once upon a time")  # now in the prefix cache
        stage.engine.fail(call, how)
        with pytest.raises(SwapError, match="could not be paused" if call == "pause" else "rolled back"):
            await stage.swap(new)
        await stage.is_serving(old)
        assert stage.swapper.restarts == 0
        await stage.swap(new)
        await stage.is_serving(new)

    run_stage(test, active=old)


def test_requests_that_do_not_end_leave_the_old_weights(run_stage: RunStage) -> None:
    async def test(stage: Stage) -> None:
        async def quiesce() -> None:
            raise FaultError("they run and run")

        with pytest.raises(SwapError, match="they run and run"):
            await stage.swap("v2", quiesce)
        await stage.is_serving("v1")

    run_stage(test, active="v1")


@pytest.mark.parametrize("call", FORWARD)
def test_an_engine_that_dies_has_the_base_weights_afterwards(run_stage: RunStage, call: str) -> None:
    async def test(stage: Stage) -> None:
        stage.engine.fail(call, "die")
        with pytest.raises(SwapError, match="restarted"):
            await stage.swap("v2")
        await stage.is_serving("base")
        assert stage.swapper.restarts == 1
        await stage.swap("v2")
        await stage.is_serving("v2")

    run_stage(test, active="v1")


@pytest.mark.parametrize("how", ["raise", "die"])
@pytest.mark.parametrize("call", FORWARD)
def test_a_rollback_that_fails_restarts_the_engine(run_stage: RunStage, call: str, how: str) -> None:
    async def test(stage: Stage) -> None:
        stage.engine.fail("ask_canary")
        stage.engine.fail(call, how, 2)
        with pytest.raises(SwapError, match="and so did the rollback .*: the engine was restarted"):
            await stage.swap("v2")
        await stage.is_serving("base")
        assert stage.swapper.restarts == 1

    run_stage(test, active="v1")


def test_an_engine_that_can_neither_pause_nor_resume_is_restarted(run_stage: RunStage) -> None:
    async def test(stage: Stage) -> None:
        stage.engine.fail("pause")
        stage.engine.fail("resume")
        with pytest.raises(SwapError, match="restarted"):
            await stage.swap("v2")
        await stage.is_serving("base")

    run_stage(test, active="v1")


@pytest.mark.parametrize(("call", "how"), [("restart", "raise"), ("restart", "wrong"), ("ask_canary", "nan")])
def test_a_restart_that_fails_is_an_engine_that_is_down(run_stage: RunStage, call: str, how: str) -> None:
    async def test(stage: Stage) -> None:
        stage.engine.fail("apply", "die")
        stage.engine.fail(call, how)
        with pytest.raises(EngineDownError, match="restarting it failed"):
            await stage.swap("v2")
        assert Phase.RESTART in (await stage.swapper.restart_engine()).seconds
        await stage.is_serving("base")
        assert stage.swapper.restarts == 2

    run_stage(test, active="v1")


def test_weights_that_are_not_finite_are_refused_and_not_remembered(run_stage: RunStage) -> None:
    async def test(stage: Stage) -> None:
        stage.engine.fail("ask_canary", "nan")
        with pytest.raises(SwapError, match="not finite"):
            await stage.swap("v1")
        await stage.is_serving("base")
        await stage.swap("v1")
        await stage.is_serving("v1")

    run_stage(test)


def test_an_engine_that_is_not_deterministic(run_stage: RunStage) -> None:
    """As on a GPU: the tolerance measured by the self-test applies to every variant."""

    async def test(stage: Stage) -> None:
        for name in ("v1", "v2", "base") * 5:
            await stage.swap(name)
            await stage.is_serving(name)
        stage.engine.fail("apply", "nothing")
        with pytest.raises(SwapError, match="does not compute with the weights"):
            await stage.swap("v1")
        await stage.is_serving("base")

    run_stage(test, noise=0.01)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["base", "v1", "v2"]),
        st.lists(
            st.tuples(st.sampled_from([*FORWARD, "restart"]), st.sampled_from(["raise", "die"]), st.integers(1, 3)),
            max_size=4,
        ),
    ),
    min_size=1,
    max_size=4,
)


@given(STEPS)
@settings(max_examples=100)
def test_any_faults_in_any_order(run_stage: RunStage, steps: list) -> None:
    """The weights are always those of the version reported as active, or the engine is reported as down."""

    async def test(stage: Stage) -> None:
        names = {loaded.version.digest: name for name, loaded in stage.weights.versions.items()}
        for target, faults in steps:
            for call, how, nth in faults:
                stage.engine.fail(call, how, nth)
            try:
                await stage.swap(target)
                assert names[stage.swapper.active.version.digest] == target
            except SwapError:
                pass
            except EngineDownError:
                for _ in range(6):  # retry until it works, as the server does
                    try:
                        await stage.swapper.restart_engine()
                    except EngineDownError:
                        continue
                    break
            await stage.is_serving(names[stage.swapper.active.version.digest])

    run_stage(test)
