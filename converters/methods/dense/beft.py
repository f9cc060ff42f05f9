"""BEFT: a trained vector is added to the outputs of a module, that is to its bias; the weight stays.

Source: arXiv 2509.15974; HF PEFT's `peft/tuners/beft/layer.py`. A module without a bias has no place for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from converters.methods.peft_form import PeftForm
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes
from converters.methods.weight_delta import Reads, WeightShape


@dataclass(frozen=True, eq=False)
class Beft(RowWise):
    """θ of one module: b (1, out). Its delta is that of the bias, which is a matrix (out, 1)."""

    name = "beft"
    formula = "`b = b0 + b_trained` (BEFT, [arXiv 2509.15974](https://arxiv.org/abs/2509.15974))"
    remark = "Changes biases alone; a module without one is refused"
    peft = PeftForm(peft_type="BEFT", parameters={"beft_bias": "b"}, mark="beft_")
    axes: ClassVar[Mapping[str, Axes]] = {"b": (1, "out")}
    changes_weight = False

    @property
    def bias(self) -> "Beft":
        """See `Method.bias`."""
        return self

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`: of the bias."""
        return self.sizes["out"], None

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.NOTHING

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "is of the bias (BEFT), for which LoRA has no factors"

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: `w0` is (n, m)."""
        found = self.rows(w0, rows) * self.weight
        return found, found.abs()

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        b = self.theta["b"].T[which]
        return b.expand(b.shape[0], w0.shape[1])
