"""DoRA on a convolution: `W = m ⊙ (W0 + s · BA) / ‖W0 + s · BA‖`, a magnitude for each output channel.

The weight, A and B are matrices as for LoRA on a convolution. A norm is that of all numbers of an output channel, so
it is DoRA of the matrix (out, in·k·k). Source: HF PEFT's `peft/tuners/lora/dora.py` (`_DoraConvNdLayer`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import ThetaError
from converters.methods.lora.other_lora import check_kernel, convolution_sizes
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes


@dataclass(frozen=True, eq=False)
class ConvDora(RowWise):
    """θ of one convolution: A (r, in, *kernel), B (out, r, 1, ...), m (1, out, 1, ...); and s."""

    name = "dora-convolution"
    formula = (
        "`W = m ⊙ (W0 + s·B·A) / ‖W0 + s·B·A‖`, by output channels (DoRA on a convolution, "
        "[arXiv 2402.09353](https://arxiv.org/abs/2402.09353))"
    )
    remark = "Not with groups, dilation or padding other than zeros"
    axes: ClassVar[Mapping[str, Axes]] = {}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """See `StoredMethod.sizes`. Raises `ThetaError` when the parts do not fit each other."""
        found = convolution_sizes(self.theta["A"], self.theta["B"])
        magnitude = tuple(self.theta["magnitude_vector"].shape)
        if magnitude != (1, found["out"], *self.theta["B"].shape[2:]):
            raise ThetaError(f"the magnitude has shape {magnitude}; expected (1, {found['out']}, 1, ...), as B has")
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """See `Method.facts`."""
        return {"method": self.name, "r": self.sizes["r"], **self.settings}

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "is of a convolution, and the lora format is for linear layers"

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`: the kernel as well, and no groups."""
        check_kernel(self.theta["A"], self.sizes["out"], shape, name)

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        up, down = self._factors(which)
        updated = w0 + up @ down
        norms: Tensor = torch.linalg.vector_norm(updated, dim=1)
        return updated * (self.theta["magnitude_vector"].flatten()[which] / norms)[:, None] - w0

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: `w0` has whole rows."""
        found = self.rows(w0, rows)[:, columns] * self.weight
        up, down = self._factors(rows)
        spread = w0[:, columns].abs() + up.abs() @ down[:, columns].abs()
        return found, found.abs() + spread * abs(self.weight)

    def _factors(self, which: Which) -> tuple[Tensor, Tensor]:
        """Rows of `s · B`, and A."""
        return self.theta["B"].flatten(1)[which] * self.given["scaling"], self.theta["A"].flatten(1)
