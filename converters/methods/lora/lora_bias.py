"""LoRA with a bias on B (`lora_bias`): `W = W0 + s · B A`, and `b = b0 + s · bias`.

HF PEFT merges it where the module has a bias only. Source: HF PEFT's `peft/tuners/lora/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from converters.methods.low_rank.low_rank import LowRank
from converters.methods.peft_form import PeftForm
from converters.methods.shapes import Axes
from converters.methods.shift import Shift


@dataclass(frozen=True, eq=False)
class LoraBias(LowRank):
    """θ of one module: A (r, in), B (out, r) and the bias of B (out,)."""

    name = "lora-bias"
    formula = "`W = W0 + s·BA`, `b = b0 + s·b_B` (LoRA, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685))"
    lora_rank = "r"
    remark = "Every adapted module needs a bias"
    axes: ClassVar[Mapping[str, Axes]] = {"A": ("r", "in"), "B": ("out", "r"), "bias": ("out",)}
    peft = PeftForm(
        peft_type="LORA",
        flag="lora_bias",
        parameters={"lora_A": "A", "lora_B": "B", "lora_B.bias": "bias"},
        mark="lora_",
    )

    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """See `LowRank.up_and_down`."""
        return self.theta["B"] * self.given["scaling"], self.theta["A"]

    @property
    def bias(self) -> Shift:
        """See `Method.bias`."""
        column = self.theta["bias"][:, None] * self.given["scaling"]
        return Shift(column, column.abs())

    @property
    def needs_bias(self) -> bool:
        """See `Method.needs_bias`."""
        return True
