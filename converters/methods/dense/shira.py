"""SHiRA: `W = W0 + S`, S sparse: trained numbers at places that are saved with them.

Source: arXiv 2406.13175; HF PEFT's `peft/tuners/shira/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from converters.methods.dense.sparse import Sparse
from converters.methods.peft_form import PeftForm
from converters.methods.shapes import Axes
from converters.methods.stored import check_indices


@dataclass(frozen=True, eq=False)
class ShiRa(Sparse):
    """θ of one module: the numbers (n,), and their rows and columns (2, n)."""

    name = "shira"
    formula = "`W = W0 + S`, S sparse (SHiRA, [arXiv 2406.13175](https://arxiv.org/abs/2406.13175))"
    axes: ClassVar[Mapping[str, Axes]] = {"weight": ("n",), "indices": (2, "n")}
    integers = frozenset({"indices"})
    peft = PeftForm(
        peft_type="SHIRA",
        parameters={"shira_weight": "weight", "shira_indices": "indices"},
        mark="shira_",
        inert=("r", "mask_type", "random_seed"),
    )

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "changes numbers here and there (SHiRA), so it is not of low rank"

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        places, numbers = self.entries((w0.shape[0], w0.shape[1]))
        flat = torch.zeros(w0.numel(), dtype=numbers.dtype, device=numbers.device)
        return flat.scatter_add_(0, places, numbers * self.weight).view(
            w0.shape
        )  # a place may stand twice, as in PEFT

    def entries(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """See `Sparse.entries`."""
        rows, columns = self._places(*shape)
        return rows * shape[1] + columns, self.theta["weight"]

    def _places(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of the numbers. Raises `ThetaError` for one outside of the weight."""
        rows, columns = self.theta["indices"].long()
        check_indices("shira_indices", rows, out)
        check_indices("shira_indices", columns, width)
        return rows, columns
