"""θ that is seen either way round: the same delta of a weight that is stored as (out, in), or as (in, out)."""

from dataclasses import dataclass, replace
from typing import Self

from converters.methods.stored import StoredMethod
from converters.methods.weight_delta import WeightShape


@dataclass(frozen=True, eq=False)
class Oriented(StoredMethod):
    """θ of one module, of a method that has something better to do than to transpose the weight.

    Attributes:
        is_transposed: for a weight that is stored as (in, out).
    """

    is_transposed: bool = False

    @property
    def module_shape(self) -> WeightShape:
        """(out, in) of the module, as far as θ says."""
        return self.sizes.get("out"), self.sizes.get("in")

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        out, width = self.module_shape
        return (width, out) if self.is_transposed else (out, width)

    @property
    def kind(self) -> str:
        """See `WeightDelta.kind`."""
        return f"{super().kind} transposed {self.is_transposed}"

    def transposed(self) -> Self:
        """See `WeightDelta.transposed`."""
        return replace(self, is_transposed=not self.is_transposed)
