"""Evaluating the delta of one weight while blocks of its rows pass by: no weight has to be in memory whole."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from converters.methods.factors import Factors


class Update(ABC):
    """The delta of one weight.

    Where `needs_pass` is set, every block goes through `see` in a first pass, and then `settle` is called. After
    that, or at once, `prepare` and `add_to` turn each block into merged rows.

    Args:
        dtype: what to evaluate in.
        device: where to evaluate.
    """

    needs_pass = False

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    def see(self, w0: Tensor, start: int) -> None:
        """Take in rows of W0 (n, in) that begin at row `start`."""
        raise NotImplementedError

    def settle(self) -> None:
        """All rows were seen."""
        raise NotImplementedError

    @abstractmethod
    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """What `add_to` needs for rows of W0 (n, in) that begin at row `start`; they may change afterwards."""

    def add_to(self, total: Tensor, prepared: Tensor) -> Tensor:
        """`total` (n, in), changed in place, plus the rows of the delta; by default `prepared` is these rows."""
        return total.add_(prepared)

    def factors(self, blocks: Iterable[Tensor]) -> Factors:
        """The exact factors of the whole delta, from all row blocks of W0 in order, for a method that has any."""
        raise NotImplementedError(f"{type(self).__name__} has no factors")

    def deltas(self, blocks: Callable[[], Iterable[Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """The delta in blocks of rows (n, in), each with the number of its first row.

        `blocks` gives all row blocks of W0 in order, perhaps twice.
        """
        if self.needs_pass:
            for start, w0 in self._numbered(blocks()):
                self.see(w0, start)
            self.settle()
        for start, w0 in self._numbered(blocks()):
            yield start, self.add_to(torch.zeros_like(w0), self.prepare(w0, start))

    def norm(self, blocks: Callable[[], Iterable[Tensor]]) -> float:
        """Frobenius norm of the delta; `blocks` is as for `deltas`."""
        return math.sqrt(sum(float(delta.double().square().sum()) for _, delta in self.deltas(blocks)))

    def _numbered(self, blocks: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Blocks in the dtype and on the device of the evaluation, each with the number of its first row."""
        start = 0
        for block in blocks:
            yield start, block.to(self._device, self._dtype)
            start += block.shape[0]


class WholeUpdate(Update):
    """A delta that is evaluated as a whole: for methods without a streaming form. Holds the weight twice.

    Args:
        delta: W0 (out, in) -> its delta.
        shape: of W0.
        dtype, device: as for `Update`.
    """

    needs_pass = True

    def __init__(
        self, delta: Callable[[Tensor], Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(dtype, device)
        self._evaluate = delta
        self._whole = torch.empty(shape, dtype=dtype, device=device)

    def see(self, w0: Tensor, start: int) -> None:
        """Keep a copy of the rows."""
        self._whole[start : start + w0.shape[0]] = w0

    def settle(self) -> None:
        """Evaluate the delta, which takes the place of W0."""
        self._whole = self._evaluate(self._whole)

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Rows of the delta."""
        return self._whole[start : start + w0.shape[0]]


class ScaledUpdate(Update):
    """Another update, times a number."""

    def __init__(self, update: Update, weight: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._update, self._weight = update, weight
        self.needs_pass = update.needs_pass

    def see(self, w0: Tensor, start: int) -> None:
        """See `Update.see`."""
        self._update.see(w0, start)

    def settle(self) -> None:
        """See `Update.settle`."""
        self._update.settle()

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """See `Update.prepare`."""
        return self._update.prepare(w0, start)

    def add_to(self, total: Tensor, prepared: Tensor) -> Tensor:
        """See `Update.add_to`."""
        delta = self._update.add_to(torch.zeros_like(total), prepared)
        return total.add_(delta, alpha=self._weight)


def merge_rows(w0: Tensor, updates: Sequence[Update], start: int) -> Tensor:
    """`W0 + Σ delta` for the rows `w0` (n, in) that begin at row `start`; `w0` is overwritten."""
    prepared = [update.prepare(w0, start) for update in updates]  # all of them read W0, before it changes
    for update, rows in zip(updates, prepared, strict=True):
        w0 = update.add_to(w0, rows)
    return w0
