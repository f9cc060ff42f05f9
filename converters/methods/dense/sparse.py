"""A delta of few numbers: only their places in the shape of W0 are needed, and most rows have few of them."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.methods.row_wise import Which
from converters.methods.stored import StoredMethod
from converters.methods.update import Update
from converters.methods.weight_delta import Reads


@dataclass(frozen=True, eq=False)
class Sparse(StoredMethod):
    """θ of one module. A subclass says which numbers are added where; the evaluation by rows follows from that."""

    @abstractmethod
    def entries(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Flat places (n,) in a weight of this shape, and what is added there (n,), not multiplied by `weight` here.

        A place may come several times: what is added is the sum.
        """

    def dense_rows(self, which: Which) -> Tensor | None:
        """Rows (n, in) of what is added beside the few numbers, not multiplied by `weight` here; None for nothing."""
        return None

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.SHAPE

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`."""
        out, width = w0.shape
        places, numbers = self.entries((out, width))
        y, x = _positions(rows, out)[places // width], _positions(columns, width)[places % width]
        inside = (y >= 0) & (x >= 0)
        found = numbers.new_zeros(len(rows), len(columns))
        found.index_put_((y[inside], x[inside]), numbers[inside], accumulate=True)
        dense = self.dense_rows(rows)
        if dense is not None:
            found += dense[:, columns]
        found = found * self.weight
        return found, found.abs()

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Update:
        """See `WeightDelta.update`."""
        return SparseUpdate(self.with_parts(self.parts_on(device, dtype)), shape, dtype, device)


class SparseUpdate(Update):
    """The numbers of each block of rows are added as it passes by."""

    def __init__(self, theta: Sparse, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._theta, self._width = theta, shape[1]
        places, numbers = theta.entries(shape)
        self._places, which = torch.unique(places, return_inverse=True)  # in increasing order
        summed = numbers.new_zeros(len(self._places)).index_add_(0, which, numbers)
        self._numbers = summed * theta.weight

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Rows of the delta: a sparse tensor, if there is nothing beside the few numbers."""
        first, end = start * self._width, (start + w0.shape[0]) * self._width
        low, high = torch.searchsorted(self._places, self._places.new_tensor([first, end])).tolist()
        places = self._places[low:high] - first
        indices = torch.stack([places // self._width, places % self._width])
        few = torch.sparse_coo_tensor(
            indices, self._numbers[low:high], tuple(w0.shape), check_invariants=False, is_coalesced=True
        )
        dense = self._theta.dense_rows(slice(start, start + w0.shape[0]))
        return few if dense is None else (dense * self._theta.weight).add_(few)


def _positions(picked: Tensor, size: int) -> Tensor:
    """For each of `size` indices, where it is in `picked`; -1 for those that are not."""
    found = torch.full((size,), -1, device=picked.device)
    found[picked] = torch.arange(len(picked), device=picked.device)
    return found
