"""GraLoRA: `W = W0 + s · (blocks of rank r/k + B A)`, a grid of k × k blocks, each with factors of its own.

The block of the outputs p and the inputs q is `B[p][the rows of q]ᵀ A[q][the columns of p]ᵀ`; together they have the
rank k · r. A hybrid adds plain factors of rank `hybrid_r`. `s = alpha / (r + hybrid_r)`. Source: arXiv 2505.20355;
HF PEFT's `peft/tuners/gralora/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import ThetaError
from converters.methods.low_rank.low_rank import LowRank
from converters.methods.peft_form import PeftForm, Shapes, integer, number, rank_of
from converters.methods.shapes import Axes
from converters.methods.weight_delta import WeightShape


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    rank_of(config, module, shapes["A"][-1])
    hybrid = integer(config, "hybrid_r", low=0)
    if (hybrid > 0) != ("A_general" in shapes) or ("A_general" in shapes) != ("B_general" in shapes):
        raise ThetaError(
            f"{module}: hybrid_r is {hybrid}, which does not agree with gralora_A_general, gralora_B_general"
        )
    return {"scaling": number(config, "alpha") / (integer(config, "r", low=1) + hybrid)}


@dataclass(frozen=True, eq=False)
class GraLora(LowRank):
    """θ of one module: A (k, in/k, r), B (k, r, out/k), of a hybrid A (h, in) and B (out, h), too."""

    name = "gralora"
    formula = (
        "`W = W0 + s·(k × k blocks of rank r/k)` (GraLoRA, [arXiv 2505.20355](https://arxiv.org/abs/2505.20355))"
    )
    lora_rank = "k·r + hybrid_r"
    remark = "Also hybrid"
    axes: ClassVar[Mapping[str, Axes]] = {
        "A": ("k", "in/k", "r"),
        "B": ("k", "r", "out/k"),
        "A_general": ("h", "in"),
        "B_general": ("out", "h"),
    }
    peft = PeftForm(
        peft_type="GRALORA",
        parameters={
            "gralora_A": "A",
            "gralora_B": "B",
            "gralora_A_general": "A_general",
            "gralora_B_general": "B_general",
        },
        optional=frozenset({"A_general", "B_general"}),
        mark="gralora_",
        fields=("r", "alpha", "hybrid_r"),
        inert=("gralora_dropout", "gralora_k"),
        settings=_settings,
    )

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        out, width = self.module_shape
        if sizes["r"] % sizes["k"] or sizes.get("in", width) != width or sizes.get("out", out) != out:
            raise ThetaError(
                f"θ has k = {sizes['k']} blocks of rank {sizes['r']} for ({out}, {width}); they do not fit"
            )

    @property
    def module_shape(self) -> WeightShape:
        """See `LowRank.module_shape`."""
        return self.sizes["k"] * self.sizes["out/k"], self.sizes["k"] * self.sizes["in/k"]

    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """See `LowRank.up_and_down`: of the rank k · r, in the order (p, q, the r/k of one block)."""
        k, r = self.sizes["k"], self.sizes["r"]
        each = r // k
        up = _block_diagonal([b.T for b in self.theta["B"]])
        rows = [[a[:, p * each : (p + 1) * each].T for a in self.theta["A"]] for p in range(k)]
        down = torch.cat([_block_diagonal(blocks) for blocks in rows])
        if "A_general" in self.theta:
            up = torch.cat([up, self.theta["B_general"]], dim=1)
            down = torch.cat([down, self.theta["A_general"]])
        return up * self.given["scaling"], down


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix
