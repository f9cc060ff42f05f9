"""A delta that is the product of two factors, which need all of W0: its singular values and vectors."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.methods.factors import Factors
from converters.methods.oriented import Oriented
from converters.methods.spectral.remembering import remembering
from converters.methods.update import Update
from converters.methods.weight_delta import Reads

# HF PEFT decomposes in float32, relative to the largest singular value: what is closer together, rounding decides
_FLOAT32 = 1e-6


@dataclass(frozen=True, eq=False)
class Decomposed(Oriented):
    """θ of one module. A subclass says what the factors are; all else follows from them."""

    @abstractmethod
    def up_and_down(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        """The factors (out, r) and (r, in), given all of W0 (out, in). They are not multiplied by `weight` here.

        Raises `ConversionError` when W0 does not determine them.
        """

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.WHOLE

    def factors(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        """`left @ right` is the delta of `w0`, as it is stored."""
        up, down = self.up_and_down(w0.T if self.is_transposed else w0)
        up = up * self.weight
        return (down.T, up.T) if self.is_transposed else (up, down)

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        left, right = self.factors(w0)
        return left @ right

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: `w0` is whole."""
        left, right = self.factors(w0)
        left, right = left[rows], right[:, columns]
        return left @ right, left.abs() @ right.abs()

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Update:
        """See `WeightDelta.update`."""
        return DecomposedUpdate(self.with_parts(self.parts_on(device, dtype)), shape, dtype, device)


class DecomposedUpdate(Update):
    """W0 is kept until all its rows have passed by, and then its factors."""

    needs_pass = True

    def __init__(self, theta: Decomposed, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._theta = theta
        self._whole = torch.empty(shape, dtype=dtype, device=device)

    def see(self, w0: Tensor, start: int) -> None:
        """See `Update.see`."""
        self._whole[start : start + w0.shape[0]] = w0

    def settle(self) -> None:
        """See `Update.settle`."""
        self._left, self._right = self._theta.factors(self._whole)
        del self._whole

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Rows of the left factor (n, r)."""
        return self._left[start : start + w0.shape[0]]

    def add_to(self, total: Tensor, prepared: Tensor) -> Tensor:
        """See `Update.add_to`."""
        return total.addmm_(prepared, self._right)

    def factors(self, blocks: Iterable[Tensor]) -> Factors:
        """See `Update.factors`."""
        for start, w0 in self._numbered(blocks):
            self.see(w0, start)
        self.settle()
        return Factors(self._left, self._right)


@remembering
def singular_parts(w0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, n), the singular values (n,) and V (n, in) of W0, n the smaller of its sizes.

    Raises `ConversionError` for a W0 that cannot be decomposed.
    """
    try:
        u, values, v = torch.linalg.svd(w0, full_matrices=False)
    except RuntimeError as error:
        raise ConversionError(f"the SVD of a weight of shape {tuple(w0.shape)} failed: {error}") from None
    return u, values, v


@remembering
def left_axes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (k, k) of a weight (k, n), k ≤ n, a column each, and its singular values, largest first.

    They are the eigenvectors of `weight weightᵀ`, always in float64, which cost a fraction of an SVD. Raises
    `ConversionError` for a weight that cannot be decomposed.
    """
    wide = weight.double()
    try:
        squares, vectors = torch.linalg.eigh(wide @ wide.T)  # in increasing order
    except RuntimeError as error:
        raise ConversionError(f"a weight of shape {tuple(weight.shape)} cannot be decomposed: {error}") from None
    return vectors.flip(1).to(weight), squares.flip(0).clamp(min=0).sqrt().to(weight)


def check_cut(values: Tensor, k: int, what: str) -> None:
    """Raise `ConversionError` unless float32 tells the k largest singular parts of W0 from the others.

    Args:
        values: the singular values, the largest first.
        k: 0, all of them, or a cut between two.
        what: the method does with the parts on one side, for the message.
    """
    limit = _FLOAT32 * values[0]
    if 0 < k < len(values) and values[k - 1] > limit and values[k - 1] - values[k] <= limit:
        raise ConversionError(
            f"the singular values {k} and {k + 1} of W0 are equal in float32, so {what} is not determined; merge the "
            "adapter, or convert it to LoRA, with PEFT where it was trained"
        )
