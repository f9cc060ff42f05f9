"""Does this vLLM swap weights right, for this model, on this device? Tried out before the server answers anybody.

vLLM 0.32 reloads mixtures of experts and W8A8 wrongly on the CPU, its own weights included, and says nothing. So
here the base is loaded over itself, then one layer is changed and changed back; each time the canary has to say so.
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
from peanut_serve.swapping.canary import Canary
from peanut_serve.swapping.transaction import Engine
from peanut_serve.variants.host_weights import HostWeights
from peanut_serve.variants.version import LoadedModel

logger = logging.getLogger("vllm.peanut_serve")

T = TypeVar("T")

_REPEATS = 3
_SLACK = 4.0  # times the largest difference between repetitions; none on a CPU


class SelfTestError(PeanutError):
    """This vLLM cannot swap the weights of this model."""


class LearningEngine(Engine, Protocol):
    """An engine that tells which tensors it loads together."""

    async def learn(self, places: Sequence[TensorInfo]) -> list[list[str]]:
        """Load all tensors; returns groups of them."""


async def try_out(engine: LearningEngine, base: Checkpoint) -> tuple[LoadedModel, Canary]:
    """Try a swap out. Returns what the engine loads, and its answer to the canary; it has the base's weights again.

    Raises `SelfTestError`.
    """
    start = time.perf_counter()
    canary = await _settle(engine)
    groups = await _load(engine, engine.learn, [info for info in base.tensors.values() if info.is_float])
    model = LoadedModel(base, groups)
    await _expect(engine, canary, "after its own weights were loaded again")
    changed = _change_something(model)
    try:
        await _load(engine, engine.apply, list(changed.tensors.values()))
        if canary.is_like(await engine.ask_canary()):
            raise SelfTestError(
                f"the engine does not notice changed weights ({next(iter(changed.tensors))}); {_CURE}"
            )
    finally:
        changed.close()
    await _load(engine, engine.apply, [base.tensors[name] for name in changed.tensors])
    await _expect(engine, canary, "after a layer was changed and changed back")
    logger.info("self-test passed in %.1f s, canary tolerance %.1g", time.perf_counter() - start, canary.tolerance)
    return model, canary


_CURE = "this vLLM cannot swap the weights of this model; serve with --mode lora, or merged folders one by one"


async def _settle(engine: Engine) -> Canary:
    """The canary's answer, and how well the engine repeats itself."""
    answers = [await engine.ask_canary() for _ in range(_REPEATS)]
    loose = replace(answers[0], tolerance=float("inf"))
    return replace(loose, tolerance=_SLACK * max(loose.distance(answer) for answer in answers))


async def _load(engine: Engine, load: Callable[[Sequence[TensorInfo]], Awaitable[T]], infos: list[TensorInfo]) -> T:
    await engine.pause()
    found = await load(infos)
    await engine.invalidate()
    await engine.resume()
    return found


async def _expect(engine: Engine, canary: Canary, when: str) -> None:
    if not canary.is_like(await engine.ask_canary()):
        raise SelfTestError(f"the engine answers otherwise {when} (a known fault of vLLM's reload); {_CURE}")


def _change_something(model: LoadedModel) -> HostWeights:
    """One layer with a matrix in it, negated."""
    base = model.base
    name = next(name for name in reversed(model.all()) if len(base.tensors[name].shape) == 2)
    names = model.with_neighbours([name])
    specs = [TensorSpec(i.name, i.dtype, i.shape, i.nbytes) for i in map(base.tensors.__getitem__, names)]
    weights = HostWeights("self-test", specs)
    with TensorReader() as reader:
        for name in names:
            weights.put(name, torch.neg(reader.whole(base.tensors[name])))
    return weights.seal()
