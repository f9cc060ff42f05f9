"""Evaluating f(W0; θ): the two factors of an update, from blocks of W0, and the merged rows. See `tweaker.py`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.activations import NEGATIVE_SLOPE, find_activation
from converters.tweaker import Orientation, Tweaker, check_fits

# float64 bytes of W0 in flight: measured; two blocks of this size stay inside a CPU's cache
BLOCK_BYTES = 2 << 20


@dataclass(frozen=True, eq=False)
class Factors:
    """The exact factors of an update: `delta = up @ down`. As LoRA: `lora_B = up`, `lora_A = down`.

    With `output_act_fn` g the update is `scaling · g(up @ down)`, and has no such factors.
    """

    up: Tensor  # (out, r)
    down: Tensor  # (r, in)
    output_act_fn: str | None = None
    scaling: float = 1.0
    negative_slope: float = NEGATIVE_SLOPE

    def delta(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start : stop` of the delta weight, (n, in)."""
        return self.add_to(torch.zeros((), dtype=self.up.dtype, device=self.up.device), start, stop)

    def add_to(self, total: Tensor, start: int, stop: int | None) -> Tensor:
        """`total` plus rows `start : stop` of the delta weight."""
        up = self.up[start:stop]
        if self.output_act_fn is None:
            return torch.addmm(total, up, self.down)
        act = find_activation(self.output_act_fn, self.negative_slope)
        return total + self.scaling * act(up @ self.down)

    def norm(self) -> float:
        """Frobenius norm of the delta weight; from two r × r Gram matrices where it is low-rank."""
        up, down = self.up.double(), self.down.double()
        if self.output_act_fn is None:
            return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())
        rows = block_rows(down.shape[1])
        blocks = (self.delta(i, i + rows).double().square().sum() for i in range(0, up.shape[0], rows))
        return math.sqrt(sum(float(block) for block in blocks))


def merge_rows(w0: Tensor, terms: Sequence[Factors], start: int, dtype: torch.dtype) -> Tensor:
    """`W0 + Σ delta` for the rows of `w0` (n, in), which begin at row `start`; summed wide, rounded once."""
    total = w0.to(terms[0].up.device, terms[0].up.dtype)
    for term in terms:
        total = term.add_to(total, start, start + w0.shape[0])
    return total.to(dtype)


def block_rows(width: int) -> int:
    """How many rows of a weight with `width` columns make one block."""
    return max(1, BLOCK_BYTES // (8 * max(1, width)))


def factors_from(tweaker: Tweaker, up: Tensor, down: Tensor) -> Factors:
    """The `Factors` of a tweaker, from `up` (out, r) without s and `down` (r, in)."""
    if tweaker.output_act_fn is None:
        return Factors(up * tweaker.scaling, down)
    return Factors(up, down, tweaker.output_act_fn, tweaker.scaling, tweaker.negative_slope)


def factors_of_blocks(
    blocks: Iterable[Tensor],
    shape: tuple[int, int],
    tweaker: Tweaker,
    dtype: torch.dtype,
    device: torch.device,
) -> Factors:
    """The factors, from the row blocks of W0 in order; holds one block and `(out + in) * r` numbers.

    Args:
        blocks: consecutive row blocks of W0, each (n, in), of any floating dtype; not read if θ is free of W0.
        shape: (out, in) of W0.
        tweaker: θ of the module.
        dtype: what to evaluate in.
        device: where to evaluate.
    """
    out, width = shape
    theta = tweaker.to(device, dtype)
    if theta.orientation is Orientation.FREE:
        return factors_from(theta, theta.hidden(theta.b), theta.a)
    start = 0
    if theta.orientation is Orientation.COLUMNS:
        projected = torch.zeros(theta.r, width, dtype=dtype, device=device)
        for block in blocks:
            stop = start + block.shape[0]
            projected.addmm_(theta.a[:, start:stop], block.to(device, dtype))
            start = stop
        return factors_from(theta, theta.b, theta.hidden(projected))
    up = torch.empty(out, theta.r, dtype=dtype, device=device)
    for block in blocks:
        stop = start + block.shape[0]
        up[start:stop] = theta.hidden(theta.a @ block.to(device, dtype).T).T
        start = stop
    return factors_from(theta, up, theta.b.T)


def _split(w0: Tensor) -> Iterator[Tensor]:
    yield from torch.split(w0, block_rows(w0.shape[1]))


def factors(w0: Tensor, tweaker: Tweaker, dtype: torch.dtype | None = None) -> Factors:
    """The exact rank-r factors of f(W0; θ).

    Args:
        w0: the original weight (out, in), any floating dtype. It is read block by block, never copied whole.
        tweaker: θ of the module.
        dtype: what to evaluate in; float32 by default, float64 if `w0` or θ is float64.

    Returns:
        `Factors` in `dtype`, on the device of `w0`.

    Raises:
        BaseMismatchError: `w0` has not the shape θ was trained for.
    """
    check_fits(tweaker.orientation.weight_shape(tweaker.a.shape, tweaker.b.shape), tuple(w0.shape), tweaker.r)
    if dtype is None:
        dtype = torch.float64 if torch.float64 in (w0.dtype, tweaker.a.dtype) else torch.float32
    return factors_of_blocks(_split(w0), (w0.shape[0], w0.shape[1]), tweaker, dtype, w0.device)


def delta_weight(w0: Tensor, tweaker: Tweaker, dtype: torch.dtype | None = None) -> Tensor:
    """f(W0; θ), scale included, (out, in); `dtype` as in `factors`.

    Raises:
        BaseMismatchError: `w0` has not the shape θ was trained for.
    """
    return factors(w0, tweaker, dtype).delta()
