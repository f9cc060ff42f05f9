"""RED (Representation EDiting): the outputs of a module are scaled and shifted, `y' = l ⊙ y + b`.

Folded into the module that gives them: `W = diag(l) W0` and `bias = l ⊙ bias0 + b`. Source: arXiv 2402.15179 and its
authors' code (github.com/mlwu22/RED, `model.py`), which scales before it shifts, and may train one of the two alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from converters.methods.multiplicative.ia3 import Ia3Update
from converters.methods.oriented import Oriented
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes
from converters.methods.weight_delta import Reads, WeightDelta, WeightShape

_AXES: Mapping[str, Axes] = {"scaling": (1, "out"), "bias": (1, "out")}


@dataclass(frozen=True, eq=False)
class Red(Oriented):
    """θ of one module: l and b, (1, out) each; or one of them."""

    name = "red"
    formula = "`W = diag(l)·W0`, `b = l ⊙ b0 + b_trained` (RED, [arXiv 2402.15179](https://arxiv.org/abs/2402.15179))"
    remark = "Where it trained b, every adapted module needs a bias; a Llama may be given one"
    axes: ClassVar[Mapping[str, Axes]] = _AXES

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.NUMBER

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "scales the outputs of the whole weight (RED), so it is not of low rank"

    @property
    def bias(self) -> WeightDelta:
        """See `Method.bias`: the outputs include it."""
        return RedBias(self.theta)

    @property
    def needs_bias(self) -> bool:
        """See `Method.needs_bias`."""
        return "bias" in self.theta

    @property
    def change(self) -> Tensor:
        """`l − 1`, times the weight of a sum; (out, 1), or (1, out) for a weight that is stored as (in, out)."""
        change = self.theta["scaling"] - 1 if "scaling" in self.theta else torch.zeros_like(self.theta["bias"])
        return (change if self.is_transposed else change.T) * self.weight

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        return w0 * self.change

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`."""
        found = w0 * (self.change[:, columns] if self.is_transposed else self.change[rows])
        return found, found.abs()

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Ia3Update:
        """See `WeightDelta.update`."""
        return Ia3Update(self.with_parts(self.parts_on(device, dtype)).change, dtype, device)


@dataclass(frozen=True, eq=False)
class RedBias(RowWise):
    """`l ⊙ b0 + b`, with a bias as a matrix (out, 1)."""

    name = "red"
    formula = Red.formula
    axes: ClassVar[Mapping[str, Axes]] = _AXES

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        return self.sizes["out"], 1

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        scaled = w0 * (self.theta["scaling"].T[which] - 1) if "scaling" in self.theta else torch.zeros_like(w0)
        return scaled + self.theta["bias"].T[which] if "bias" in self.theta else scaled
