"""LoHa: `W = W0 + s · (B1 A1) ⊙ (B2 A2)`, the elementwise product of two products.

As LoRA it has the rank r · r: columns of lora_B are products of a column of B1 and one of B2. `s = alpha / r`.
Source: arXiv 2108.06098 (FedPara), 2309.14859 (LyCORIS); HF PEFT's `peft/tuners/loha/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from converters.methods.peft_form import PeftForm, Shapes, alpha_over_r
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes
from converters.methods.weight_delta import Reads


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    return {"scaling": alpha_over_r(config, module, shapes["w1_b"][0])}


@dataclass(frozen=True, eq=False)
class LoHa(RowWise):
    """θ of one module: w1_a, w2_a (out, r), w1_b, w2_b (r, in)."""

    name = "loha"
    formula = "`W = W0 + s·(B1·A1) ⊙ (B2·A2)` (LoHa, [arXiv 2108.06098](https://arxiv.org/abs/2108.06098))"
    lora_rank = "r²"
    remark = "As LoRA where r² is smaller than the weight"
    axes: ClassVar[Mapping[str, Axes]] = {
        "w1_a": ("out", "r"),
        "w1_b": ("r", "in"),
        "w2_a": ("out", "r"),
        "w2_b": ("r", "in"),
    }
    peft = PeftForm(
        peft_type="LOHA",
        parameters={f"hada_{part}": part for part in axes},
        mark="hada_",
        fields=("r", "alpha"),
        inert=("rank_dropout", "module_dropout", "use_effective_conv2d", "rank_pattern", "alpha_pattern"),
        settings=_settings,
    )

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.NOTHING

    @property
    def rank(self) -> int | None:
        """See `WeightDelta.rank`."""
        rank = self.sizes["r"] ** 2
        return rank if rank < min(self.sizes["out"], self.sizes["in"]) else None

    @property
    def full_rank_reason(self) -> str | None:
        """See `WeightDelta.full_rank_reason`."""
        return None if self.rank else f"has the rank {self.sizes['r']}² (LoHa), no smaller than that of the weight"

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        theta = self.theta
        first = (theta["w1_a"][which] * float(self.given["scaling"])) @ theta["w1_b"]
        return first.mul_(theta["w2_a"][which] @ theta["w2_b"])

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: only these numbers are computed."""
        up1, up2 = self.theta["w1_a"][rows], self.theta["w2_a"][rows]
        down1, down2 = self.theta["w1_b"][:, columns], self.theta["w2_b"][:, columns]
        scale = float(self.given["scaling"]) * self.weight
        spread = (up1.abs() @ down1.abs()) * (up2.abs() @ down2.abs()) * abs(scale)
        return (up1 @ down1) * (up2 @ down2) * scale, spread

    def few_factors(self) -> tuple[Tensor, Tensor]:
        """See `RowWise.few_factors`: the products of every pair of columns, and of every pair of rows."""
        theta, out, width = self.theta, self.sizes["out"], self.sizes["in"]
        up = (theta["w1_a"][:, :, None] * theta["w2_a"][:, None, :]).reshape(out, -1)
        down = (theta["w1_b"][:, None, :] * theta["w2_b"][None, :, :]).reshape(-1, width)
        return up * self.given["scaling"], down
