"""A delta whose rows depend on θ and, at most, on the same row of W0: it is evaluated as the rows pass by."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.methods.factors import Factors
from converters.methods.stored import StoredMethod
from converters.methods.update import Update
from converters.methods.weight_delta import Reads

Which = slice | Tensor  # of the rows: a block, or indices (n,)


@dataclass(frozen=True, eq=False)
class RowWise(StoredMethod):
    """θ of one module. A subclass says what rows of its delta are; all else follows from that."""

    @abstractmethod
    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """Rows of the delta (n, in), given the same rows of W0, which a method may leave unread.

        They are not multiplied by `weight` here.
        """

    def few_factors(self) -> tuple[Tensor, Tensor] | None:
        """(out, r) and (r, in) whose product is the delta, not multiplied by `weight`, where r is small; or None."""
        return None

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.ROWS

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        return self.rows(w0, slice(0, w0.shape[0])) * self.weight

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: `w0` has whole rows, if it is read at all."""
        found = self.rows(w0, rows)[:, columns] * self.weight
        return found, found.abs()

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Update:
        """See `WeightDelta.update`."""
        return RowsUpdate(self.with_parts(self.parts_on(device, dtype)), dtype, device)


class RowsUpdate(Update):
    """Rows of the delta are evaluated as the blocks pass by."""

    def __init__(self, theta: RowWise, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._theta = theta

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Rows of the delta."""
        rows = self._theta.rows(w0.to(self._dtype), slice(start, start + w0.shape[0]))
        return rows if self._theta.weight == 1 else rows * self._theta.weight

    def factors(self, blocks: Iterable[Tensor]) -> Factors:
        """See `Update.factors`."""
        found = self._theta.few_factors()
        if found is None:
            return super().factors(blocks)
        return Factors(found[0] * self._theta.weight, found[1])
