"""A self-test at start-up: do the workers restore and update weights from the copies of W0 on their devices?

Rows of a layer are negated twice: as the host would do it, and by factors on the devices. These have one number in
each column of `up`, and `W0 + up @ down` is then exact in every precision, so that both ways give the same bits.
"""

import logging
import time
from dataclasses import replace

import torch
from torch import Tensor

from converters import Checkpoint
from converters.serving import TensorReader, TensorSpec
from peanut_serve.swapping.checks.canary import Canary
from peanut_serve.swapping.checks.self_test import (
    ADVICE,
    LearningEngine,
    SelfTestError,
    expect_answer,
    load_paused,
)
from peanut_serve.variants.host_weights import HostWeights
from peanut_serve.variants.on_device.copies import DeviceCopies
from peanut_serve.variants.on_device.factors import arithmetic_of
from peanut_serve.variants.on_device.places import Factored
from peanut_serve.variants.version import LoadedModel

logger = logging.getLogger("vllm.peanut_serve")

_ROWS = 64  # that are negated at most


async def check_copies(engine: LearningEngine, model: LoadedModel, canary: Canary, copies: DeviceCopies) -> None:
    """Change a layer by factors on the devices, and restore it from the copies. Warns if these will not all fit.

    Raises `SelfTestError` if an answer of the engine is not the expected one, and `VariantError` if the devices have
    no memory for one layer.
    """
    start, base = time.perf_counter(), model.base
    matrices = [info for info in map(base.tensors.__getitem__, model.all()) if len(info.shape) == 2]
    inner = [info.name for info in matrices if "embed" not in info.name and "lm_head" not in info.name]
    if (shortage := await copies.shortage(model.with_neighbours(inner))) is not None:
        logger.warning("if variants change all layers: %s", shortage)
    name = (inner or [info.name for info in matrices])[-1]
    names = model.with_neighbours([name])
    await copies.prepare(names)
    whole, factors = _negated_rows(base, name, is_factored=False), _negated_rows(base, name, is_factored=True)
    try:
        own = {other: base.tensors[other] for other in names}
        await load_paused(engine, engine.apply, [*(own | dict(whole.places)).values()])
        changed = replace(await engine.ask_canary(), tolerance=canary.tolerance)
        if canary.is_like(changed):
            raise SelfTestError(f"changed rows of {name} have no effect on the engine; {ADVICE}")
        kept = {other: copies.kept[other] for other in names}
        await load_paused(engine, engine.apply, [*kept.values()])
        await expect_answer(engine, canary, "after a layer was restored from W0 on the device")
        await load_paused(engine, engine.apply, [*(kept | dict(factors.places)).values()])
        await expect_answer(
            engine, changed, "after a layer was updated on the device, from that of the host's update"
        )
        await load_paused(engine, engine.apply, [*kept.values()])
        await expect_answer(engine, canary, "after it was restored again")
    finally:
        whole.close()
        factors.close()
    logger.info("self-test of the copies on the devices passed in %.1f s", time.perf_counter() - start)


def _negated_rows(base: Checkpoint, name: str, is_factored: bool) -> HostWeights:
    """A tensor of the base with some of its rows negated, whole or as factors of the change."""
    info = base.tensors[name]
    with TensorReader() as reader:
        w0 = reader.whole(info)
    count = min(_ROWS, w0.shape[0])
    rows = torch.linspace(0, w0.shape[0] - 1, count).long()  # of every shard
    spec = TensorSpec(name, info.dtype, info.shape, info.nbytes)
    if not is_factored:
        w0[rows] = -w0[rows]
        return _sealed({name: w0}, [spec], {})
    dtype = arithmetic_of(info.torch_dtype)
    up = torch.zeros(w0.shape[0], count, dtype=dtype)
    up[rows, torch.arange(count)] = -2.0
    down = w0[rows].to(dtype)
    parts = {f"{name}: up": up, f"{name}: down": down}
    up_spec, down_spec = (
        TensorSpec(part, "F32" if dtype is torch.float32 else "F64", tuple(factor.shape), factor.nbytes)
        for part, factor in parts.items()
    )
    return _sealed(parts, [spec], {name: Factored(info, up_spec, down_spec)})


def _sealed(tensors: dict[str, Tensor], specs: list[TensorSpec], factored: dict[str, Factored]) -> HostWeights:
    weights = HostWeights("self-test", specs, factored)
    for name, tensor in tensors.items():
        weights.put(name, tensor)
    return weights.seal()
