"""The exact factors of a delta weight: `delta = up @ down`. As LoRA: `lora_B = up`, `lora_A = down`."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.files.blocks import block_rows
from converters.methods.peanut.activations import NEGATIVE_SLOPE, find_activation


@dataclass(frozen=True, eq=False)
class Factors:
    """Two factors of a delta weight.

    With `output_act_fn` g the delta is `scaling · g(up @ down)`, which is not of low rank.
    """

    up: Tensor  # (out, r)
    down: Tensor  # (r, in)
    output_act_fn: str | None = None
    scaling: float = 1.0
    negative_slope: float = NEGATIVE_SLOPE

    def delta(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start : stop` of the delta weight, (n, in)."""
        up = self.up[start:stop]
        return self.add_to(torch.zeros(len(up), self.down.shape[1], dtype=up.dtype, device=up.device), up)

    def add_to(self, total: Tensor, up: Tensor) -> Tensor:
        """`total` (n, in), changed in place, plus the rows of the delta weight whose left factor is `up` (n, r)."""
        if self.output_act_fn is None:
            return total.addmm_(up, self.down)
        act = find_activation(self.output_act_fn, self.negative_slope)
        return total.add_(act(up @ self.down), alpha=self.scaling)

    def norm(self) -> float:
        """Frobenius norm of the delta weight; from two r × r Gram matrices where it is low-rank."""
        up, down = self.up.double(), self.down.double()
        if self.output_act_fn is None:
            return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())
        rows = block_rows(down.shape[1])
        blocks = (self.delta(i, i + rows).double().square().sum() for i in range(0, up.shape[0], rows))
        return math.sqrt(sum(float(block) for block in blocks))
