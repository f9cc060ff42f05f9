"""Approximating the delta of one weight by two factors of a given rank: its truncated singular value decomposition.

No other factors of that rank come closer in the Frobenius norm (Eckart and Young, 1936). Where exact factors are
known, only a matrix of their rank is decomposed, by LAPACK's SVD. Otherwise the singular vectors are the eigenvectors
of the smaller Gram matrix. In float64 that is several times as fast as an SVD of the weight. Singular values below
1e-8 of the largest are lost in rounding errors, which does not matter for errors above 1e-6. The stated error is
measured on the difference itself, not derived from singular values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.errors import NonFiniteError, VerificationError
from converters.evaluation.precision import EVALUATION_DTYPE, ROUNDOFF
from converters.files.blocks import block_rows
from converters.files.reader import TensorReader
from converters.methods.finite import all_finite
from converters.methods.weight_delta import WeightDelta
from converters.plans.merge import Plan
from converters.plans.tensor import TensorPlan


@dataclass(frozen=True, eq=False)
class Truncation:
    """The best approximation of a delta by factors of some rank, in float64.

    Attributes:
        up: (out, rank).
        down: (rank, in).
        norm: Frobenius norm of the delta.
        lost: Frobenius norm of `delta - up @ down`.
        squares: squares of all singular values of the delta, the largest first.
    """

    up: Tensor
    down: Tensor
    norm: float
    lost: float
    squares: Tensor

    @property
    def error(self) -> float:
        """What is lost, relative to the delta."""
        return self.lost / self.norm if self.norm else 0.0

    def rank_for(self, max_error: float) -> int:
        """The smallest rank whose error is surely at most `max_error`, whatever the rounding of the squares."""
        roundoff = len(self.squares) * torch.finfo(self.squares.dtype).eps * float(self.squares[0])
        lost = self.squares.flip(0).cumsum(0).flip(0) + roundoff  # at [k]: by rank k
        enough = lost <= (max_error * self.norm) ** 2
        return max(1, int(enough.int().argmax()) if bool(enough.any()) else len(self.squares))


def sum_delta(plan: Plan, tensor: TensorPlan, reader: TensorReader, device: torch.device) -> Tensor:
    """The sum of all updates of one weight as its module has it, (out, in), in float64 on `device`.

    Raises `NonFiniteError` if it is not finite.
    """
    if tensor.source is None:
        raise ValueError(f"{tensor.name} is not from the base")
    source, shape = tensor.source, (tensor.shape[0], tensor.shape[1])
    total = torch.zeros(shape, dtype=EVALUATION_DTYPE, device=device)
    for term in tensor.terms:
        update = plan.delta_of(term).update(shape, EVALUATION_DTYPE, device)
        for start, rows in update.deltas(lambda: reader.row_blocks(source, block_rows(source.row_size))):
            total[start : start + len(rows)] += rows
    if not all_finite(total):
        raise NonFiniteError(f"{tensor.name}: its update is not finite; is this the base it was trained on?")
    return total.T if tensor.is_transposed else total


def truncate(delta: Tensor, rank: int) -> Truncation:
    """The best factors of `delta` (out, in), which is overwritten."""
    norm, is_wide = float(delta.norm()), delta.shape[0] < delta.shape[1]
    tall = delta.T if is_wide else delta  # (m, n), n <= m
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    right = vectors[:, -rank:].flip(1)  # (n, rank), orthonormal
    left = tall @ right  # (m, rank), each column as long as its singular value
    lost = float(tall.addmm_(left, right.T, alpha=-1).norm())
    scale = left.norm(dim=0).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    left, right = (left / scale).cpu(), (right * scale).cpu()
    up, down = (right, left.T) if is_wide else (left, right.T)
    return Truncation(up, down, norm, lost, values.flip(0).clamp(min=0).cpu())


def truncate_factors(up: Tensor, down: Tensor, rank: int) -> Truncation:
    """The best factors of `up @ down`, (out, r) and (r, in), with r at most out and in."""
    left, core_left = torch.linalg.qr(up)
    right, core_right = torch.linalg.qr(down.T)
    u, values, vh = torch.linalg.svd(core_left @ core_right.T)
    scale = values[:rank].sqrt()
    kept_up, kept_down = left @ (u[:, :rank] * scale), (vh[:rank] * scale[:, None]) @ right.T
    return Truncation(kept_up, kept_down, float(values.norm()), float(values[rank:].norm()), values.square())


def check_truncation(
    up: Tensor,
    down: Tensor,
    tensor: TensorPlan,
    deltas: Sequence[WeightDelta],
    dtype: torch.dtype,
    reader: TensorReader,
    stated: float,
) -> tuple[int, float]:
    """Recompute all updates of one weight whole in float64, by their definition, and compare it with `up @ down`.

    Args:
        up, down: factors of the weight as it is stored, rounded to `dtype`, in float64.
        tensor: the weight.
        deltas: its updates, in float64.
        dtype: of the factors.
        reader: reads the base.
        stated: the relative error that the factors had before they were rounded.

    Returns: (numbers recomputed, relative error of these factors).

    Raises `VerificationError` if it differs from `stated` by more than rounding each factor once makes it. The
    columns of `up` are orthogonal, and so are the rows of `down`: that bounds what rounding the other factor does.
    """
    if tensor.source is None:
        raise ValueError(f"{tensor.name} is not from the base")
    w0 = reader.whole(tensor.source).double()
    delta = torch.zeros_like(w0)
    for one in deltas:
        delta += one.delta(w0)
    norm, roundoff = float(delta.norm()) or 1.0, ROUNDOFF * float(w0.norm())
    found = float(delta.addmm_(up, down, alpha=-1).norm()) / norm
    tiny = torch.finfo(dtype).smallest_normal
    lengths = (up.abs() + tiny).norm(dim=0) * (down.abs() + tiny).norm(dim=1)
    rounding = torch.finfo(dtype).eps * float(lengths.norm())
    if abs(found - stated) > (rounding + roundoff) / norm + ROUNDOFF:
        raise VerificationError(
            f"{tensor.name}: the factors differ from its update by {found:.3e} of it, expected {stated:.3e}"
        )
    return delta.numel(), found
