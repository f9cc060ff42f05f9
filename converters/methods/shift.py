"""What is added to a bias and does not depend on it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from converters.methods.weight_delta import Reads, WeightDelta, WeightShape


@dataclass(frozen=True, eq=False)
class Shift(WeightDelta):
    """`b = b0 + column`.

    Attributes:
        column: (out, 1).
        spread: the sums of magnitudes that it was added up from, (out, 1).
    """

    column: Tensor
    spread: Tensor

    @property
    def parts(self) -> dict[str, Tensor]:
        """See `WeightDelta.parts`."""
        return {"column": self.column}

    def with_parts(self, parts: Mapping[str, Tensor]) -> "Shift":
        """See `WeightDelta.with_parts`."""
        return replace(self, column=parts["column"])

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`: of the bias as a matrix."""
        return self.column.shape[0], 1

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.NOTHING

    @property
    def kind(self) -> str:
        """See `WeightDelta.kind`."""
        return f"shift {tuple(self.column.shape)}"

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        return self.column.clone()

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`."""
        return self.column[rows][:, columns], self.spread[rows][:, columns]
