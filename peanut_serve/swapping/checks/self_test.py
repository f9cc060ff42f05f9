"""A self-test at start-up: does this vLLM swap the weights of this model correctly, on this device?

On the CPU, vLLM 0.32 reloads mixtures of experts and W8A8 models incorrectly, even with unchanged weights, and
reports no error. The test therefore loads the base over itself, then changes one layer and restores it. After each
step, the canary's answer is checked.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch

from converters import Checkpoint
from converters.errors import PeanutError
from converters.serving import TensorInfo, TensorReader, TensorSpec
from peanut_serve.swapping.checks.canary import Canary
from peanut_serve.swapping.transaction import Engine
from peanut_serve.variants.host_weights import HostWeights
from peanut_serve.variants.on_device.copies import Keeper
from peanut_serve.variants.on_device.places import Place
from peanut_serve.variants.version import LoadedModel

logger = logging.getLogger("vllm.peanut_serve")

T = TypeVar("T")
P = TypeVar("P", bound=Place)

_REPEATS = 3
_SLACK = 4.0  # times the largest difference between repetitions, which is 0 on a CPU


class SelfTestError(PeanutError):
    """This vLLM cannot swap the weights of this model."""


class LearningEngine(Engine, Keeper, Protocol):
    """An engine that can report which tensors it loads together, and keep some on its devices."""

    async def learn(self, places: Sequence[TensorInfo]) -> list[list[str]]:
        """Load all tensors; return the groups that have to be loaded together."""


async def run_self_test(engine: LearningEngine, base: Checkpoint) -> tuple[LoadedModel, Canary]:
    """Swap weights for a test, and restore the base's. Returns the tensors that the engine loads, and its canary.

    Raises `SelfTestError` if an answer of the engine is not the expected one.
    """
    start = time.perf_counter()
    canary = await measure_canary(engine)
    groups = await load_paused(engine, engine.learn, [info for info in base.tensors.values() if info.is_float])
    model = LoadedModel(base, groups)
    await expect_answer(engine, canary, "after its own weights were loaded again")
    changed = _negated_layer(model)
    try:
        await load_paused(engine, engine.apply, list(changed.places.values()))
        if canary.is_like(await engine.ask_canary()):
            raise SelfTestError(
                f"changed weights have no effect on the engine ({next(iter(changed.tensors))}); {ADVICE}"
            )
    finally:
        changed.close()
    await load_paused(engine, engine.apply, [base.tensors[name] for name in changed.tensors])
    await expect_answer(engine, canary, "after a layer was changed and restored")
    logger.info("self-test passed in %.1f s, canary tolerance %.1g", time.perf_counter() - start, canary.tolerance)
    return model, canary


ADVICE = "this vLLM cannot swap the weights of this model; use --mode lora, or serve each merged folder separately"


async def measure_canary(engine: Engine) -> Canary:
    """The canary's answer, with a tolerance measured by repeating it."""
    answers = [await engine.ask_canary() for _ in range(_REPEATS)]
    loose = replace(answers[0], tolerance=float("inf"))
    return replace(loose, tolerance=_SLACK * max(loose.distance(answer) for answer in answers))


async def load_paused(engine: Engine, load: Callable[[Sequence[P]], Awaitable[T]], places: Sequence[P]) -> T:
    """Load tensors while the engine is paused, and discard what it had computed with others."""
    await engine.pause()
    found = await load(places)
    await engine.invalidate()
    await engine.resume()
    return found


async def expect_answer(engine: Engine, canary: Canary, when: str) -> None:
    """Raise `SelfTestError` unless the engine gives an answer."""
    if not canary.is_like(await engine.ask_canary()):
        raise SelfTestError(f"the engine's answer differs {when} (a known fault of vLLM's reload); {ADVICE}")


def _negated_layer(model: LoadedModel) -> HostWeights:
    """A copy of one layer that has a matrix, negated."""
    base = model.base
    name = next(name for name in reversed(model.all()) if len(base.tensors[name].shape) == 2)
    names = model.with_neighbours([name])
    specs = [TensorSpec(i.name, i.dtype, i.shape, i.nbytes) for i in map(base.tensors.__getitem__, names)]
    weights = HostWeights("self-test", specs)
    with TensorReader() as reader:
        for name in names:
            weights.put(name, torch.neg(reader.whole(base.tensors[name])))
    return weights.seal()
