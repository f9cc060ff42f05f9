"""The self-test at start-up, which checks that the engine swaps the weights of this model correctly.

The engine is a fake, because the installed vLLM does not have the faults that have to be detected.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.server.fake_engine import FakeEngine, FaultError, read
from support.tiny_models import Pair, edit_weights

from converters.files.header import TensorInfo
from converters.models.checkpoint import Checkpoint, open_checkpoint
from peanut_serve.swapping.checks.canary import Canary, CanaryError
from peanut_serve.swapping.checks.self_test import SelfTestError, run_self_test
from peanut_serve.variants.version import LoadedModel


@pytest.fixture
def base(pair: Pair) -> Checkpoint:
    return open_checkpoint(pair.base)


def tried_out(engine: FakeEngine, base: Checkpoint) -> tuple[LoadedModel, Canary]:
    return asyncio.run(run_self_test(engine, base))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_correct_engine_has_its_weights_again(base: Checkpoint) -> None:
    engine, before = FakeEngine(base), open_files()
    model, canary = tried_out(engine, base)
    assert engine.weights == read(base.tensors.values())
    assert engine.resumed.is_set()
    assert engine.violations == []
    assert [len(names) for names in engine.applied] == [len(base.tensors), 1, 1]  # all, changed, restored
    assert set(model.all()) == set(base.tensors)
    assert len(model.with_neighbours(["model.layers.0.self_attn.v_proj.weight"])) == 3
    assert engine.calls.count("invalidate") == 3
    assert canary.tolerance == 0.0
    assert open_files() == before


def test_an_engine_that_reloads_its_own_weights_wrongly(base: Checkpoint) -> None:
    engine = FakeEngine(base)
    engine.reloads_wrongly = True
    with pytest.raises(SelfTestError, match="answer differs after its own weights were loaded again .* --mode lora"):
        tried_out(engine, base)


def test_an_engine_that_loads_nothing(base: Checkpoint) -> None:
    engine, before = FakeEngine(base), open_files()
    engine.fail("apply", "nothing", 1, 2)
    with pytest.raises(SelfTestError, match=r"changed weights have no effect on the engine \(model.*weight\)"):
        tried_out(engine, base)
    assert open_files() == before


def test_an_engine_that_cannot_restore_a_layer(base: Checkpoint) -> None:
    engine = FakeEngine(base)
    engine.fail("apply", "nothing", 3)
    with pytest.raises(SelfTestError, match="differs after a layer was changed and restored"):
        tried_out(engine, base)


@pytest.mark.parametrize("call", ["pause", "apply", "invalidate", "resume", "ask_canary"])
def test_an_engine_that_fails(base: Checkpoint, call: str) -> None:
    before = open_files()
    for nth in (1, 2, 3):
        engine = FakeEngine(base)
        engine.fail(call, "raise", nth)
        with pytest.raises(FaultError):
            tried_out(engine, base)
    assert open_files() == before


def test_a_base_that_answers_with_nan(pair: Pair) -> None:
    base = open_checkpoint(pair.base)
    engine = FakeEngine(base, noise=math.nan)
    with pytest.raises(SelfTestError):
        tried_out(engine, base)


def test_the_tolerance_is_measured(base: Checkpoint) -> None:
    noisy = [tried_out(FakeEngine(base, noise), base)[1].tolerance for noise in (1e-4, 1e-2)]
    assert 1e-5 < noisy[0] < 8e-4 < noisy[1] < 8e-2
    engine = FakeEngine(base, noise=1e-4)
    engine.fail("apply", "nothing", 3)
    with pytest.raises(SelfTestError, match="restored"):  # noise does not hide wrong weights
        tried_out(engine, base)


def test_layers_that_have_no_matrix_are_not_changed(pair: Pair) -> None:
    """The changed layer must affect the answer: the sign of a norm may not."""
    edit_weights(pair.base / "model.safetensors", lambda weights: dict(sorted(weights.items())))
    base = open_checkpoint(pair.base)
    engine = FakeEngine(base)
    tried_out(engine, base)
    assert all(len(base.tensors[name].shape) == 2 for name in engine.applied[1])


CANARY = Canary((1,), ({1: -0.5, 2: -1.0}, {3: -0.25, 4: -2.0}), tolerance=0.1)


@pytest.mark.parametrize(
    ("logprobs", "reason"),
    [
        (({1: -0.5, 2: -1.2}, {3: -0.25, 4: -2.0}), "differ by 0.2,"),
        (({1: -0.5, 5: -1.0}, {3: -0.25, 4: -2.0}), "differ by inf"),
        (({1: -0.5, 2: -1.0},), "differ by inf"),
        (({1: -0.5, 2: math.nan}, {3: -0.25, 4: -2.0}), "not finite"),
        (({1: -0.5, 2: -1.0}, {3: -math.inf, 4: -2.0}), "not finite"),
        ((), "not finite"),
    ],
)
def test_another_answer(logprobs: Sequence[dict[int, float]], reason: str) -> None:
    other = replace(CANARY, logprobs=tuple(logprobs))
    assert not CANARY.is_like(other)
    with pytest.raises(CanaryError, match=reason):
        CANARY.check(other)


def test_the_same_answer() -> None:
    near = replace(CANARY, logprobs=({1: -0.45, 2: -1.0}, {3: -0.25, 4: -2.05}))
    CANARY.check(near)
    assert CANARY.is_like(near)
    with pytest.raises(CanaryError, match=r"differ by 0.05, expected at most 0:"):
        replace(CANARY, tolerance=0.0).check(near)


def test_a_tensor_the_engine_does_not_load(base: Checkpoint) -> None:
    """Such as a tied embedding: it is in no group, and cannot be swapped."""

    class Tied(FakeEngine):
        async def learn(self, places: Sequence[TensorInfo]) -> list[list[str]]:
            return [group for group in await super().learn(places) if group != ["lm_head.weight"]]

    model, _ = tried_out(Tied(base), base)
    assert set(base.tensors) - set(model.all()) == {"lm_head.weight"}
