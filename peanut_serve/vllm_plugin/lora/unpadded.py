"""LoRA factors without their padding, for steps of few tokens, which take as long as it takes to read the factors.

vLLM pads every slot to the largest rank, and gives every linear layer of a fused one factors, whether or not an
adapter changes it. Here the rows that are not zero in A are copied once after an adapter was loaded, those of all
slots below each other, so that one product reads those of all slots of a step. The copies take at most as much memory
as the slots.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Ranks = tuple[int, ...]  # of the adapter in each slot, in one linear layer


@dataclass(frozen=True)
class UnpaddedFactors:
    """Factors of one linear layer.

    Attributes:
        a: (sum of ranks, in).
        b: (sum of ranks, out).
        ranks: number of rows of each slot.
        are_finite: whether those of one slot, multiplied with zeros, leave the answers of others alone.
    """

    a: Tensor
    b: Tensor
    ranks: Ranks
    are_finite: bool
    versions: tuple[int, int]  # of the padded factors


class FactorStore:
    """Copies of the padded factors, made anew once vLLM has written to those: PyTorch counts the writes."""

    def __init__(self) -> None:
        self._made: MutableMapping[Tensor, UnpaddedFactors] = WeakIdKeyDictionary()  # by the padded a

    def __len__(self) -> int:
        return len(self._made)

    def unpadded(self, a: Tensor, b: Tensor) -> UnpaddedFactors:
        """The factors in `a` (slots, 1, r, in) and `b` (slots, 1, out, r), which are no inference tensors."""
        versions = a._version, b._version
        made = self._made.get(a)
        if made is None or made.versions != versions:
            made = self._made[a] = _unpadded(a, b, versions)
        return made


def _unpadded(a: Tensor, b: Tensor, versions: tuple[int, int]) -> UnpaddedFactors:
    rows, columns = a.squeeze(1), b.squeeze(1).transpose(1, 2)  # (slots, r, in), (slots, r, out)
    used = rows.any(2)
    kept_a, kept_b = rows[used], columns[used]
    are_finite = all(bool(kept.isfinite().all()) for kept in (kept_a, kept_b))
    return UnpaddedFactors(kept_a, kept_b, tuple(used.sum(1).tolist()), are_finite, versions)


class FewTokens:
    """A step of few tokens: which rows of unpadded factors each of them is multiplied with.

    Args:
        slots: of each token; -1 for none.
    """

    def __init__(self, slots: Tensor) -> None:
        present = torch.unique(slots[slots >= 0])
        self._slots = slots
        self._first, self._end = int(present[0]), int(present[-1]) + 1
        self._is_uniform = bool((slots == self._first).all())
        self._own: dict[Ranks, Tensor] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, y: Tensor, x: Tensor, factors: UnpaddedFactors, scale: float) -> None:
        """`y += scale * x @ a.T @ b.T` with the factors of each token's slot, which are finite.

        Tokens are multiplied with the factors of all slots from the first to the last that the step needs, and the
        products with those of other slots are set to zero: that takes fewer operations, and reads no more. 16-bit
        factors are widened each time, which takes less than oneDNN's products of so few rows in bfloat16.

        Args:
            y: (n, out).
            x: (n, in), float32.
            factors: of all slots.
            scale: of the products.
        """
        start, end = sum(factors.ranks[: self._first]), sum(factors.ranks[: self._end])
        if start == end:
            return
        h = x @ factors.a[start:end].float().T
        if not self._is_uniform:
            h.mul_(self._mask(factors.ranks))
        y.add_(h @ factors.b[start:end].float(), alpha=scale)

    def _mask(self, ranks: Ranks) -> Tensor:
        """(n, rows): 1 in the rows of each token's slot, 0 elsewhere."""
        if ranks not in self._own:
            slots, counts = torch.arange(self._first, self._end), torch.tensor(ranks[self._first : self._end])
            self._own[ranks] = (self._slots[:, None] == slots.repeat_interleave(counts)).float()
        return self._own[ranks]
