"""What most methods are built on: θ as named tensors beside its settings, and the weight of a sum."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from converters.errors import ThetaError
from converters.methods.base import Method
from converters.methods.shapes import Axes, find_sizes
from converters.methods.weight_delta import WeightShape

# of indices in θ
INDEX_DTYPES = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


@dataclass(frozen=True, eq=False)
class StoredMethod(Method):
    """θ of one module.

    Attributes:
        theta: part -> tensor.
        given: everything else that the formula needs, as JSON values.
        weight: what the delta is multiplied by in a sum.

    A subclass says in `axes` which shape each part has: `out` and `in` are those of the weight. Raises `ThetaError`
    when the shapes do not fit each other.
    """

    axes: ClassVar[Mapping[str, Axes]]
    may_be_empty: ClassVar[str | None] = None

    theta: Mapping[str, Tensor]
    given: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def __post_init__(self) -> None:
        self.check(self.sizes)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """See `Method.from_parts`."""
        return cls(dict(parts), dict(settings))

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise `ThetaError` for sizes that the formula has no place for."""

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The name of an axis -> its size."""
        shapes = {part: tuple(tensor.shape) for part, tensor in self.theta.items()}
        return find_sizes(shapes, self.axes, self.may_be_empty)

    @property
    def parts(self) -> dict[str, Tensor]:
        """See `WeightDelta.parts`."""
        return dict(self.theta)

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return dict(self.given)

    @property
    def kind(self) -> str:
        """See `WeightDelta.kind`."""
        return super().kind if self.weight == 1 else f"{self.weight} * {super().kind}"

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        return self.sizes.get("out"), self.sizes.get("in")

    def with_parts(self, parts: Mapping[str, Tensor]) -> Self:
        """See `WeightDelta.with_parts`."""
        return replace(self, theta=dict(parts))

    def times(self, weight: float) -> Self:
        """See `WeightDelta.times`."""
        return replace(self, weight=self.weight * weight)


def check_indices(name: str, indices: Tensor, size: int) -> None:
    """Raise `ThetaError` for an index outside of `0 .. size - 1`; torch counts negative ones from the end."""
    if indices.device.type == "meta" or not indices.numel() or torch.compiler.is_exporting():
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= size:
        raise ThetaError(f"{name} has indices from {low} to {high}; expected 0 to {size - 1}; the adapter is damaged")
