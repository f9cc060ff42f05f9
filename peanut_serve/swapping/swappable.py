"""An engine whose weights can be swapped, and the base's weights that a swap needs."""

from dataclasses import dataclass

from converters import Checkpoint
from peanut_serve.swapping.self_test import LearningEngine, measure_canary, run_self_test
from peanut_serve.swapping.transaction import Engine, Swapper
from peanut_serve.variants.host_cache import BaseWeights
from peanut_serve.variants.version import LoadedModel, base_version


@dataclass(frozen=True, eq=False)
class SwappableEngine:
    """An engine that has passed the self-test, or whose weights stay the base's.

    Attributes:
        engine: the engine; it starts with the base's weights.
        model: the tensors that it loads.
        swapper: swaps its weights.
        base_weights: W0, to restore the base's weights.
    """

    engine: Engine
    model: LoadedModel
    swapper: Swapper
    base_weights: BaseWeights


async def make_swappable(engine: LearningEngine, base: Checkpoint, base_on_host: bool) -> SwappableEngine:
    """Run the self-test of an engine, and set up the swapping of its weights.

    Args:
        engine: it has the base's weights.
        base: the checkpoint it was started from.
        base_on_host: keep the base's tensors that variants change in host memory.

    Raises `SelfTestError` if the engine does not swap the weights of this model correctly.
    """
    model, canary = await run_self_test(engine, base)
    base_weights = BaseWeights(base, on_host=base_on_host)
    swapper = Swapper(engine, model, base_weights.tensors, base_version(base), canary)
    return SwappableEngine(engine, model, swapper, base_weights)


async def keep_base_weights(engine: Engine, base: Checkpoint) -> SwappableEngine:
    """Set up an engine whose weights stay the base's: every variant is LoRA on top of them. It can be restarted."""
    model, base_weights = LoadedModel(base, ()), BaseWeights(base, on_host=False)
    canary = await measure_canary(engine)
    return SwappableEngine(engine, model, Swapper(engine, model, {}, base_version(base), canary), base_weights)
