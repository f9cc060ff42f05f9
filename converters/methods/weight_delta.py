"""What is added to one weight: all that evaluation and verification know of a method."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum

import torch
from torch import Tensor

from converters.errors import BaseMismatchError
from converters.methods.update import ScaledUpdate, Update, WholeUpdate

# (out, in) of the weight θ was trained for; None where θ does not say
WeightShape = tuple[int | None, int | None]


class Reads(Enum):
    """What one number of a delta depends on."""

    NOTHING = "nothing"  # of W0: on θ alone
    SHAPE = "shape"  # on the shape of W0, and none of its numbers
    NUMBER = "number"  # on the same number of W0
    ROWS = "rows"  # on the same row of W0
    COLUMNS = "columns"  # on the same column of W0, so all rows have to pass by before
    WHOLE = "whole"  # on all of W0


class WeightDelta(ABC):
    """What is added to one weight: all that the evaluation and the verification need."""

    @property
    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The tensors of θ by name, in order."""

    @abstractmethod
    def with_parts(self, parts: Mapping[str, Tensor]) -> "WeightDelta":
        """The same formula and settings with other tensors."""

    @property
    @abstractmethod
    def weight_shape(self) -> WeightShape:
        """(out, in) of the weight θ was trained for, as far as θ says."""

    @property
    @abstractmethod
    def reads(self) -> Reads:
        """What of W0 the delta depends on."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What the delta depends on besides W0 and the numbers in θ: its formula, settings and shapes."""

    @abstractmethod
    def delta(self, w0: Tensor) -> Tensor:
        """`g(W0; θ) − W0`, (out, in), in the dtype of θ.

        Args:
            w0: the original weight (out, in), in the dtype and on the device of θ.
        """

    @property
    def is_costly(self) -> bool:
        """Whether it costs far more than to read and write the weight, so that its precision matters for the time."""
        return False

    @property
    def rank(self) -> int | None:
        """The rank of the exact factors of the delta once W0 is known; None if it has none."""
        return None

    @property
    def full_rank_reason(self) -> str | None:
        """Why it has no exact factors, to follow 'the update of <module>'; None if it has."""
        return "is not of low rank" if self.rank is None else None

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "WeightDelta":
        """The same with its tensors on `device` in `dtype`."""
        return self.with_parts(self.parts_on(device, dtype))

    def parts_on(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of θ by name, on `device` in `dtype`; indices keep theirs."""
        return {
            name: part.to(device, dtype if part.is_floating_point() else part.dtype)
            for name, part in self.parts.items()
        }

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """Raise `BaseMismatchError` unless θ was trained for a weight of this shape."""
        trained = self.weight_shape
        if len(shape) == 2 and all(want in (None, got) for want, got in zip(trained, shape, strict=True)):
            return
        found = " x ".join(f"{axis} = {size}" for axis, size in zip(("out", "in"), trained, strict=True) if size)
        rank = f" (r = {self.rank})" if self.rank is not None else ""
        cause = self._mismatch_cause(shape)
        if len(shape) > 2:
            cause = "it is no matrix (a convolution's is not), and this method is merged into matrices only"
        raise BaseMismatchError(
            f"{name}: the weight has shape {tuple(shape)}, θ was trained for {found}{rank}; {cause}"
        )

    def _mismatch_cause(self, shape: tuple[int, ...]) -> str:
        """The likely cause of a weight of another shape."""
        return "this is another base, or another model size"

    def times(self, weight: float) -> "WeightDelta":
        """The delta multiplied by the weight of a sum."""
        return self if weight == 1 else Scaled(self, weight)

    def transposed(self) -> "WeightDelta":
        """The delta that takes W0ᵀ and gives `delta(W0)ᵀ`, for weights that are stored as (in, out)."""
        return Transposed(self)

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The delta at some rows and columns, and the sum of magnitudes that it was added up from.

        The verification calls this with numbers that it has read itself, apart from what the evaluation read.

        Args:
            w0: what `reads` asks for: W0 at `rows` (n, in), at `columns` (out, m), whole, something of its shape
                whose numbers are not to be read (out, in), or W0 at both (n, m).
            rows, columns: indices (n,) and (m,).

        Returns: two tensors (n, m).
        """
        found = self.delta(w0)[rows][:, columns]
        return found, found.abs()

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Update:
        """The evaluation of the delta of a weight of this shape while its blocks pass by; by default as a whole."""
        return WholeUpdate(self.to(device, dtype).delta, shape, dtype, device)


class _Wrapped(WeightDelta):
    """Another delta, seen otherwise."""

    def __init__(self, inner: WeightDelta) -> None:
        self._inner = inner

    @property
    def parts(self) -> dict[str, Tensor]:
        return self._inner.parts

    @property
    def weight_shape(self) -> WeightShape:
        return self._inner.weight_shape

    @property
    def reads(self) -> Reads:
        return self._inner.reads

    @property
    def is_costly(self) -> bool:
        return self._inner.is_costly


class Scaled(_Wrapped):
    """A delta multiplied by a number. It is not factored: a method with factors scales them itself (`times`)."""

    def __init__(self, inner: WeightDelta, weight: float) -> None:
        super().__init__(inner)
        self._weight = weight

    @property
    def full_rank_reason(self) -> str | None:
        """Why it has no exact factors."""
        return self._inner.full_rank_reason or super().full_rank_reason

    @property
    def kind(self) -> str:
        """See `WeightDelta.kind`."""
        return f"{self._weight} * {self._inner.kind}"

    def with_parts(self, parts: Mapping[str, Tensor]) -> "Scaled":
        """The same with other tensors."""
        return Scaled(self._inner.with_parts(parts), self._weight)

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        return self._inner.delta(w0) * self._weight

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`."""
        found, spread = self._inner.delta_at(w0, rows, columns)
        return found * self._weight, spread * abs(self._weight)

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Update:
        """See `WeightDelta.update`."""
        return ScaledUpdate(self._inner.update(shape, dtype, device), self._weight, dtype, device)


class Transposed(_Wrapped):
    """A delta on a weight that is stored as (in, out), by a method that knows (out, in) only."""

    @property
    def weight_shape(self) -> WeightShape:
        """Of the weight as it is stored."""
        out, width = self._inner.weight_shape
        return width, out

    @property
    def reads(self) -> Reads:
        """Rows and columns change places."""
        swapped = {Reads.ROWS: Reads.COLUMNS, Reads.COLUMNS: Reads.ROWS}
        return swapped.get(self._inner.reads, self._inner.reads)

    @property
    def kind(self) -> str:
        """See `WeightDelta.kind`."""
        return f"transposed {self._inner.kind}"

    def with_parts(self, parts: Mapping[str, Tensor]) -> "Transposed":
        """The same with other tensors."""
        return Transposed(self._inner.with_parts(parts))

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        return self._inner.delta(w0.T).T

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`."""
        found, spread = self._inner.delta_at(w0.T, columns, rows)
        return found.T, spread.T
