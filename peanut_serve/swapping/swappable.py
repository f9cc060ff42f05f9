"""An engine whose weights can be swapped, and the base's weights that a swap needs."""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from converters import Checkpoint
from peanut_serve.swapping.checks.device_test import check_copies
from peanut_serve.swapping.checks.self_test import LearningEngine, measure_canary, run_self_test
from peanut_serve.swapping.transaction import Engine, Swapper
from peanut_serve.variants.host_cache import BaseWeights
from peanut_serve.variants.on_device.copies import DeviceCopies
from peanut_serve.variants.on_device.places import Place
from peanut_serve.variants.version import LoadedModel, base_version


@dataclass(frozen=True, eq=False)
class SwappableEngine:
    """An engine that has passed the self-test, or whose weights stay the base's.

    Attributes:
        engine: the engine; it starts with the base's weights.
        model: the tensors that it loads.
        swapper: swaps its weights.
        base_weights: W0, to restore the base's weights.
        copies: W0 of what is evaluated on the devices, if anything is.
    """

    engine: Engine
    model: LoadedModel
    swapper: Swapper
    base_weights: BaseWeights
    copies: DeviceCopies | None = None


async def make_swappable(
    engine: LearningEngine, base: Checkpoint, base_copy: Literal["host", "disk", "device"]
) -> SwappableEngine:
    """Run the self-test of an engine, and set up the swapping of its weights.

    Args:
        engine: it has the base's weights.
        base: the checkpoint it was started from.
        base_copy: where the base's tensors that variants change are kept. On disk, they are read from its files. On
            the device, variants are evaluated from them; what cannot be is kept on the host.

    Raises `SelfTestError` if the engine does not swap the weights of this model correctly.
    """
    model, canary = await run_self_test(engine, base)
    base_weights, copies = BaseWeights(base, on_host=base_copy != "disk"), None
    places: Mapping[str, Place] = base_weights.tensors
    if base_copy == "device":
        copies = DeviceCopies(base, engine)
        await check_copies(engine, model, canary, copies)
        places = ChainMap[str, Place](cast("dict[str, Place]", copies.kept), cast("dict[str, Place]", places))
    return SwappableEngine(
        engine, model, Swapper(engine, model, places, base_version(base), canary), base_weights, copies
    )


async def keep_base_weights(engine: Engine, base: Checkpoint) -> SwappableEngine:
    """Set up an engine whose weights stay the base's: every variant is LoRA on top of them. It can be restarted."""
    model, base_weights = LoadedModel(base, ()), BaseWeights(base, on_host=False)
    canary = await measure_canary(engine)
    return SwappableEngine(engine, model, Swapper(engine, model, {}, base_version(base), canary), base_weights)
