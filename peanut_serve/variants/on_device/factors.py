"""Which tensors of a variant are sent to the workers as exact factors, and how these are written to host memory."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from converters import Plan
from converters.errors import NonFiniteError
from converters.serving import TensorInfo, TensorPlan, TensorSpec, Worker, rank_of, sum_factors
from peanut_serve.variants.on_device.places import Factored


class Sink(Protocol):
    """What factors are written to; see `HostWeights`."""

    def put(self, name: str, piece: Tensor) -> None:
        """Write the next piece of a tensor."""


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """What `W0 + up @ down` is computed in, for a W0 of this dtype, before it is rounded once.

    For 16 bits it is float32, and so are the factors: a result is then off by half a unit in its last place, as that
    of the host is, plus at most `(r + 3) 2^-24 (|W0| + |up| |down|)`, which is far below the roundings of its
    neighbours (2^-9 or 2^-12 of them). So it differs from the host's, which is computed in float64, in about one
    number in a thousand: by one unit, or by more where W0 and the update nearly cancel. Many GPUs compute in float64
    at a 64th of the speed, and twice the bytes would travel. For wider dtypes it is float64, as on the host.
    """
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def factored_tensors(plan: Plan, tensors: Iterable[TensorPlan]) -> dict[str, Factored]:
    """The tensors whose updates have exact factors of at most half the size of the tensor, by name."""
    found = {}
    for tensor in tensors:
        rank = _rank_of(plan, tensor)
        if rank is None or tensor.source is None:
            continue
        out, in_ = tensor.source.shape
        dtype = "F32" if arithmetic_of(tensor.source.torch_dtype) is torch.float32 else "F64"
        up, down = _spec(f"{tensor.name}: up", dtype, out, rank), _spec(f"{tensor.name}: down", dtype, rank, in_)
        if 2 * (up.nbytes + down.nbytes) <= tensor.nbytes:
            found[tensor.name] = Factored(tensor.source, up, down)
    return found


def _rank_of(plan: Plan, tensor: TensorPlan) -> int | None:
    """The rank of a weight's update; None if it is not that of a whole matrix, or has no exact factors."""
    source = tensor.source
    if not tensor.terms or source is None or tensor.saved is not None or tensor.is_stack or len(tensor.shape) != 2:
        return None
    if (source.name, source.dtype, source.shape) != (tensor.name, tensor.dtype, tensor.shape) or not source.is_float:
        return None
    for term in tensor.terms:
        is_parameter = plan.adapters[term.adapter].adapter.is_parameter(term.module)
        if term.parameter != "weight" or term.part is not None or is_parameter:
            return None
    return rank_of(plan, tensor) or None


def _spec(name: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, dtype, shape, math.prod(shape) * (4 if dtype == "F32" else 8))


@dataclass(frozen=True)
class FactorsJob:
    """Evaluates the factors of one tensor in float64, and writes them; see `converters.evaluation.pool.Job`."""

    plan: Plan
    tensor: TensorPlan
    factored: Factored
    into: Sink
    is_finished: bool = False

    @property
    def source(self) -> TensorInfo | None:
        """The tensor of the base that it reads."""
        return self.tensor.source

    def run(self, worker: Worker) -> None:
        """Write both factors. Raises `NonFiniteError` if one has a number that does not fit its dtype."""
        worker.check_stopped()
        up, down = sum_factors(self.plan, self.tensor, worker.reader, worker.device)
        if self.tensor.is_transposed:  # they are those of the module, whose weight is (out, in)
            up, down = down.T, up.T
        for spec, factor in ((self.factored.up, up), (self.factored.down, down)):
            rounded = factor.to(torch.float32 if spec.dtype == "F32" else torch.float64).contiguous()
            if tuple(rounded.shape) != spec.shape:
                raise ValueError(f"{spec.name} has shape {tuple(rounded.shape)}, expected {spec.shape}")
            if not bool(rounded.isfinite().all()):
                raise NonFiniteError(f"{spec.name} of its update is not finite; is this the base it was trained on?")
            self.into.put(spec.name, rounded)
