"""A delta on some rows of a tensor, where a checkpoint stores several weights as one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from converters.methods.update import Update
from converters.methods.weight_delta import Reads, WeightDelta, WeightShape


class Placed(WeightDelta):
    """Another delta on the rows `start : stop` of a matrix of `height` rows; it is zero elsewhere."""

    def __init__(self, inner: WeightDelta, start: int, stop: int, height: int) -> None:
        self._inner, self._start, self._stop, self._height = inner, start, stop, height

    @property
    def parts(self) -> dict[str, Tensor]:
        """See `WeightDelta.parts`."""
        return self._inner.parts

    @property
    def weight_shape(self) -> WeightShape:
        """Of the whole tensor."""
        return self._height, self._inner.weight_shape[1]

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return self._inner.reads

    @property
    def is_costly(self) -> bool:
        """See `WeightDelta.is_costly`."""
        return self._inner.is_costly

    @property
    def full_rank_reason(self) -> str | None:
        """See `WeightDelta.full_rank_reason`."""
        return "is on a part of a tensor"

    @property
    def kind(self) -> str:
        """See `WeightDelta.kind`."""
        return f"rows {self._start} to {self._stop} of {self._height}: {self._inner.kind}"

    def with_parts(self, parts: Mapping[str, Tensor]) -> "Placed":
        """See `WeightDelta.with_parts`."""
        return Placed(self._inner.with_parts(parts), self._start, self._stop, self._height)

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        found = torch.zeros_like(w0)
        found[self._start : self._stop] = self._inner.delta(w0[self._start : self._stop])
        return found

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`."""
        inside = (rows >= self._start) & (rows < self._stop)
        found = torch.zeros(len(rows), len(columns), dtype=w0.dtype, device=w0.device)
        spread = torch.zeros_like(found)
        if bool(inside.any()):
            has_all_rows = self.reads in (Reads.COLUMNS, Reads.SHAPE, Reads.WHOLE)
            own = w0[self._start : self._stop] if has_all_rows else w0[inside]
            found[inside], spread[inside] = self._inner.delta_at(own, rows[inside] - self._start, columns)
        return found, spread

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Update:
        """See `WeightDelta.update`."""
        inner = self._inner.update((self._stop - self._start, shape[1]), dtype, device)
        return _PlacedUpdate(inner, self._start, self._stop, dtype, device)


class _PlacedUpdate(Update):
    """Another update, which takes part only in its rows."""

    def __init__(self, inner: Update, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._inner, self._start, self._stop = inner, start, stop
        self.needs_pass = inner.needs_pass

    def _own(self, start: int, count: int) -> slice:
        """Which of `count` rows from `start` on are its own."""
        low = min(max(self._start - start, 0), count)
        return slice(low, max(low, min(self._stop - start, count)))

    def see(self, w0: Tensor, start: int) -> None:
        """See `Update.see`."""
        own = self._own(start, len(w0))
        if own.start < own.stop:
            self._inner.see(w0[own], start + own.start - self._start)

    def settle(self) -> None:
        """See `Update.settle`."""
        self._inner.settle()

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Its rows of the delta, and zeros."""
        own, found = self._own(start, len(w0)), torch.zeros_like(w0)
        if own.start < own.stop:
            prepared = self._inner.prepare(w0[own], start + own.start - self._start)
            self._inner.add_to(found[own], prepared)
        return found
