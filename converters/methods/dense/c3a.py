"""C3A: `W = W0 + C / in`, C made of circulant blocks: every row of a block is the one above, moved by one.

Source: arXiv 2407.19342; HF PEFT's `peft/tuners/c3a/layer.py`, `utils.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from converters.methods.peft_form import PeftForm
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes
from converters.methods.weight_delta import Reads, WeightShape


@dataclass(frozen=True, eq=False)
class C3a(RowWise):
    """θ of one module: the first row of every block, (out / b, in / b, b)."""

    name = "c3a"
    formula = "`W = W0 + C / in`, C of circulant blocks (C³A, [arXiv 2407.19342](https://arxiv.org/abs/2407.19342))"
    axes: ClassVar[Mapping[str, Axes]] = {"kernel": ("out/b", "in/b", "b")}
    peft = PeftForm(
        peft_type="C3A",
        parameters={"c3a_kernel": "kernel"},
        mark="c3a_",
        inert=("block_size", "block_size_pattern"),
    )

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        return self.sizes["out/b"] * self.sizes["b"], self.sizes["in/b"] * self.sizes["b"]

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.NOTHING

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "consists of circulant blocks (C3A), so it is not of low rank"

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        out, width = self.weight_shape
        device = self.theta["kernel"].device
        return self._at(torch.arange(out or 0, device=device)[which], torch.arange(width or 0, device=device))

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: only these numbers are computed."""
        found = self._at(rows, columns) * self.weight
        return found, found.abs()

    def _at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Some rows and columns of `C / in`: row i of a block is the kernel, moved right by i."""
        kernel, b = self.theta["kernel"], self.sizes["b"]
        places = (columns % b - rows[:, None] % b) % b
        return kernel[rows[:, None] // b, columns // b, places] / (self.sizes["in/b"] * b)
