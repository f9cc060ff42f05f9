"""Evaluating f(W0; θ) from row blocks of W0: merged rows, and the two factors of an update. See `tweaker.py`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from converters.files.blocks import block_rows
from converters.methods.activations import NEGATIVE_SLOPE, find_activation
from converters.methods.peanut import Orientation, Tweaker, check_fits


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
        up = self.up[start:stop]
        return self.add_to(torch.zeros(len(up), self.down.shape[1], dtype=up.dtype, device=up.device), up)

    def add_to(self, total: Tensor, up: Tensor) -> Tensor:
        """`total` (n, in), changed in place, plus the rows of the delta weight whose left factor is `up` (n, r)."""
        if self.output_act_fn is None:
            return total.addmm_(up, self.down)
        act = find_activation(self.output_act_fn, self.negative_slope)
        return total.add_(act(up @ self.down), alpha=self.scaling)

    def norm(self) -> float:
        """Frobenius norm of the delta weight; from two r × r Gram matrices where it is low-rank."""
        up, down = self.up.double(), self.down.double()
        if self.output_act_fn is None:
            return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())
        rows = block_rows(down.shape[1])
        blocks = (self.delta(i, i + rows).double().square().sum() for i in range(0, up.shape[0], rows))
        return math.sqrt(sum(float(block) for block in blocks))


def factors_from(tweaker: Tweaker, up: Tensor, down: Tensor) -> Factors:
    """The `Factors` of a tweaker, from `up` (out, r) without s and `down` (r, in)."""
    if tweaker.output_act_fn is None:
        return Factors(up * tweaker.scaling, down)
    return Factors(up, down, tweaker.output_act_fn, tweaker.scaling, tweaker.negative_slope)


class Update:
    """The update of one weight, evaluated while the row blocks of W0 pass by.

    In the columns orientation h needs all rows: `see` every block of a first pass, then `settle`. Then, and in the
    other orientations at once, `up` and `add_to` give the merged rows of each block. Holds `(out + in) * r` numbers.

    Args:
        tweaker: θ of the module.
        width: columns of W0.
        dtype: what to evaluate in.
        device: where to evaluate.
    """

    def __init__(self, tweaker: Tweaker, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._theta = theta = tweaker.to(device, dtype)
        self.needs_pass = theta.orientation is Orientation.COLUMNS
        if self.needs_pass:
            self._projected = torch.zeros(theta.r, width, dtype=dtype, device=device)
            self._terms = factors_from(theta, theta.b, self._projected)
        elif theta.orientation is Orientation.ROWS:
            self._terms = factors_from(theta, theta.b[:0], theta.b.T.contiguous())
        else:
            self._terms = factors_from(theta, theta.hidden(theta.b), theta.a)

    def see(self, w0: Tensor, start: int) -> None:
        """Take in rows of W0 (n, in) that begin at row `start`."""
        self._projected.addmm_(self._theta.a[:, start : start + w0.shape[0]], w0)

    def settle(self) -> None:
        """All rows were seen."""
        self._terms = replace(self._terms, down=self._theta.hidden(self._projected))
        del self._projected

    def up(self, w0: Tensor, start: int) -> Tensor:
        """Rows of the left factor (n, r) for rows of W0 (n, in) that begin at row `start`."""
        if self._theta.orientation is not Orientation.ROWS:
            return self._terms.up[start : start + w0.shape[0]]
        h = self._theta.hidden(self._theta.a @ w0.T).T
        return h if self._theta.output_act_fn else h * self._theta.scaling

    def add_to(self, total: Tensor, up: Tensor) -> Tensor:
        """`total` (n, in), changed in place, plus the rows of the update that `up` tells."""
        return self._terms.add_to(total, up)

    def factors(self, blocks: Iterable[Tensor]) -> Factors:
        """The factors of the whole update, from all row blocks of W0 in order; not read if θ is free of W0."""
        if self.needs_pass:
            for start, w0 in self._numbered(blocks):
                self.see(w0, start)
            self.settle()
        if self._theta.orientation is not Orientation.ROWS:
            return self._terms
        return replace(self._terms, up=torch.cat([self.up(w0, start) for start, w0 in self._numbered(blocks)]))

    def _numbered(self, blocks: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Blocks in the dtype and on the device of θ, each with the number of its first row."""
        start = 0
        for block in blocks:
            yield start, block.to(self._theta.a.device, self._theta.a.dtype)
            start += block.shape[0]


def merge_rows(w0: Tensor, updates: Sequence[Update], start: int) -> Tensor:
    """`W0 + Σ delta` for the rows `w0` (n, in) that begin at row `start`; `w0` is overwritten."""
    ups = [update.up(w0, start) for update in updates]  # all of them read W0, before it changes
    for update, up in zip(updates, ups, strict=True):
        w0 = update.add_to(w0, up)
    return w0


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
    update = Update(tweaker, w0.shape[1], dtype, w0.device)
    return update.factors(torch.split(w0, block_rows(w0.shape[1])))


def delta_weight(w0: Tensor, tweaker: Tweaker, dtype: torch.dtype | None = None) -> Tensor:
    """f(W0; θ), scale included, (out, in); `dtype` as in `factors`.

    Raises:
        BaseMismatchError: `w0` has not the shape θ was trained for.
    """
    return factors(w0, tweaker, dtype).delta()
