"""The tweaker f(W0; θ) of one module. This is the only home of the formula.

PEANuT (arXiv 2410.01870, §3.3) adapts a frozen weight by a small network that reads it, `W = W0 + f(W0; θ)`.
The last step of f is linear, so the update has an exact factorisation `f(W0; θ) = up @ down` of rank ≤ r,
at any depth and for any elementwise activation σ. With h the last hidden layer:

    columns   f = s · B σ(A W0)        A (r, out), B (out, r), h (r, in)    up = s · B    down = h
    rows      f = s · σ(W0 Aᵀ) Bᵀ      A (r, in),  B (in, r),  h (out, r)   up = s · h    down = Bᵀ

`columns` is what HF PEFT trains (`peft/tuners/peanut/layer.py`); `rows` is the paper's equation. Deeper
tweakers put r × r layers with mirrored residuals between σ and B (paper, Fig. 2).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from converters.activations import ACTIVATIONS
from converters.errors import BaseMismatchError, ThetaError

# float64 bytes of W0 in flight: measured; two blocks of this size stay inside a CPU's cache
BLOCK_BYTES = 2 << 20


class Orientation(str, Enum):
    """Which vectors of W0 the tweaker reads."""

    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True, eq=False)
class Tweaker:
    """θ of one module. `d` is `out` in the columns orientation and `in` in the rows orientation.

    Raises `ThetaError` when the shapes do not fit each other or the activation is unknown.
    """

    orientation: Orientation
    a: Tensor  # (r, d)
    b: Tensor  # (d, r)
    encoders: tuple[Tensor, ...] = ()  # each (r, r)
    decoders: tuple[Tensor, ...] = ()  # each (r, r)
    act_fn: str = "relu"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.act_fn not in ACTIVATIONS:
            raise ThetaError(f"unknown act_fn '{self.act_fn}'; known are {', '.join(sorted(ACTIVATIONS))}")
        if self.a.dim() != 2 or self.b.shape != self.a.shape[::-1]:
            raise ThetaError(
                f"A has shape {tuple(self.a.shape)} and B {tuple(self.b.shape)}; wanted (r, d) and (d, r)"
            )
        if len(self.encoders) != len(self.decoders):
            raise ThetaError(f"{len(self.encoders)} encoders but {len(self.decoders)} decoders")
        for layer in (*self.encoders, *self.decoders):
            if tuple(layer.shape) != (self.r, self.r):
                raise ThetaError(f"a hidden layer has shape {tuple(layer.shape)}; wanted {(self.r, self.r)}")

    @property
    def r(self) -> int:
        """The rank: hidden size of f, and the rank of its exact factors."""
        return self.a.shape[0]

    @property
    def depth(self) -> int:
        """PEFT's depth: pairs of hidden r × r layers. The paper counts 2 * depth + 2."""
        return len(self.encoders)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Tweaker":
        """The same tweaker with its tensors on `device` in `dtype`."""
        return Tweaker(
            self.orientation,
            self.a.to(device, dtype),
            self.b.to(device, dtype),
            tuple(e.to(device, dtype) for e in self.encoders),
            tuple(d.to(device, dtype) for d in self.decoders),
            self.act_fn,
            self.scaling,
        )

    def hidden(self, projected: Tensor) -> Tensor:
        """h from the projection `A W0` (r, n) or `(W0 Aᵀ)ᵀ` (r, n): features lie on dimension 0."""
        act = ACTIVATIONS[self.act_fn]
        h = act(projected)
        residuals = []
        for encoder in self.encoders:
            residuals.append(h)
            h = act(encoder @ h)
        for decoder in self.decoders:
            h = act(decoder @ h) + residuals.pop()
        return h


@dataclass(frozen=True, eq=False)
class Factors:
    """The exact factors of an update: `delta = up @ down`. As LoRA: `lora_B = up`, `lora_A = down`."""

    up: Tensor  # (out, r)
    down: Tensor  # (r, in)

    def merge_rows(self, w0: Tensor, start: int, dtype: torch.dtype) -> Tensor:
        """`W0 + delta` for the rows of `w0` (n, in), which begin at row `start`; summed wide, rounded once."""
        up = self.up[start : start + w0.shape[0]]
        return torch.addmm(w0.to(up.device, up.dtype), up, self.down).to(dtype)

    def norm(self) -> float:
        """Frobenius norm of the delta weight, from two r × r Gram matrices."""
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


def block_rows(width: int) -> int:
    """How many rows of a weight with `width` columns make one block."""
    return max(1, BLOCK_BYTES // (8 * max(1, width)))


def check_fits(orientation: Orientation, size: int, shape: tuple[int, ...], name: str = "w0") -> None:
    """Raise `BaseMismatchError` unless θ of `size` (see `Tweaker`) was made for a weight of `shape` (out, in)."""
    axis = 0 if orientation is Orientation.COLUMNS else 1
    if len(shape) != 2 or shape[axis] != size:
        raise BaseMismatchError(
            f"{name}: the weight has shape {tuple(shape)}, θ was trained for {('out', 'in')[axis]} = {size}; "
            "this is another base, or another model size"
        )


def factors_of_blocks(
    blocks: Iterable[Tensor],
    shape: tuple[int, int],
    tweaker: Tweaker,
    dtype: torch.dtype,
    device: torch.device,
) -> Factors:
    """The factors, from the row blocks of W0 in order; holds one block and `(out + in) * r` numbers.

    Args:
        blocks: consecutive row blocks of W0, each (n, in), of any floating dtype.
        shape: (out, in) of W0.
        tweaker: θ of the module.
        dtype: what to evaluate in.
        device: where to evaluate.
    """
    out, width = shape
    theta = tweaker.to(device, dtype)
    if theta.orientation is Orientation.COLUMNS:
        projected = torch.zeros(theta.r, width, dtype=dtype, device=device)
        start = 0
        for block in blocks:
            stop = start + block.shape[0]
            projected.addmm_(theta.a[:, start:stop], block.to(device, dtype))
            start = stop
        return Factors(theta.b * theta.scaling, theta.hidden(projected))
    up = torch.empty(out, theta.r, dtype=dtype, device=device)
    start = 0
    for block in blocks:
        stop = start + block.shape[0]
        h = theta.hidden(theta.a @ block.to(device, dtype).T)  # (r, n)
        torch.mul(h.T, theta.scaling, out=up[start:stop])
        start = stop
    return Factors(up, theta.b.T)


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
    check_fits(tweaker.orientation, tweaker.a.shape[1], tuple(w0.shape))
    if dtype is None:
        dtype = torch.float64 if torch.float64 in (w0.dtype, tweaker.a.dtype) else torch.float32
    return factors_of_blocks(_split(w0), (w0.shape[0], w0.shape[1]), tweaker, dtype, w0.device)


def delta_weight(w0: Tensor, tweaker: Tweaker, dtype: torch.dtype | None = None) -> Tensor:
    """f(W0; θ), scale included, (out, in); `dtype` as in `factors`.

    Raises:
        BaseMismatchError: `w0` has not the shape θ was trained for.
    """
    pair = factors(w0, tweaker, dtype)
    return pair.up @ pair.down
