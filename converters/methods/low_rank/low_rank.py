"""A delta that is the product of two factors, both from θ alone: `delta = up @ down`."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from converters.methods.factors import Factors
from converters.methods.oriented import Oriented
from converters.methods.update import Update
from converters.methods.weight_delta import Reads


@dataclass(frozen=True, eq=False)
class LowRank(Oriented):
    """θ of one module. A subclass says what its factors are; all else follows from them."""

    @abstractmethod
    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """The factors (out, r) and (r, width), scale included.

        They are asked for on the meta device, too. Where θ does not say `out`, or `in`, any number of rows, or of
        columns, may be asked for: the first ones.
        """

    @cached_property
    def rank(self) -> int:
        """See `WeightDelta.rank`."""
        described = self.with_parts(
            self.parts_on("meta", torch.float32)
        )  # as parts of several dtypes do not multiply
        out, width = self.module_shape
        return described.up_and_down(out or 1, width or 1)[0].shape[1]

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.NOTHING

    def factors(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """`left @ right`, (rows, r) and (r, columns), is the delta of a weight of that shape, as it is stored."""
        out, width = (columns, rows) if self.is_transposed else (rows, columns)
        up, down = self.up_and_down(out, width)
        up = up if self.weight == 1 else up * self.weight
        return (down.T, up.T) if self.is_transposed else (up, down)

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        left, right = self.factors(w0.shape[0], w0.shape[1])
        return left @ right

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`."""
        left, right = self.factors(int(rows.max()) + 1, int(columns.max()) + 1)
        left, right = left[rows], right[:, columns]
        return left @ right, left.abs() @ right.abs()

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Update:
        """See `WeightDelta.update`."""
        theta = self.with_parts(self.parts_on(device, dtype))
        return LowRankUpdate(theta.factors(*shape), dtype, device)


class LowRankUpdate(Update):
    """Rows of the left factor are multiplied by the right one as the blocks pass by."""

    def __init__(self, factors: tuple[Tensor, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._left, self._right = factors

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Rows of the left factor (n, r)."""
        return self._left[start : start + w0.shape[0]]

    def add_to(self, total: Tensor, prepared: Tensor) -> Tensor:
        """See `Update.add_to`."""
        return total.addmm_(prepared, self._right)

    def factors(self, blocks: Iterable[Tensor]) -> Factors:
        """See `Update.factors`: they do not depend on W0."""
        return Factors(self._left, self._right)
