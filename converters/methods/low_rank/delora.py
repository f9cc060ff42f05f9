"""DeLoRA: `W = W0 + B diag(λ / (r ‖A_i‖ ‖B_i‖)) A diag(w)`: normalised factors, a trained strength λ, and the norms w
of the columns that W0 had when the training began.

Source: arXiv 2503.18225; HF PEFT's `peft/tuners/delora/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.methods.low_rank.low_rank import LowRank
from converters.methods.peft_form import PeftForm, Shapes, rank_of
from converters.methods.shapes import Axes

_LEAST_NORM = 1e-4  # HF PEFT's


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    rank_of(config, module, shapes["A"][0])
    return {}


@dataclass(frozen=True, eq=False)
class DeLora(LowRank):
    """θ of one module: A (r, in), B (out, r), λ (1,) and w (in,)."""

    name = "delora"
    formula = (
        "`W = W0 + B·diag(λ / (r·‖A‖·‖B‖))·A·diag(w)` (DeLoRA, [arXiv 2503.18225](https://arxiv.org/abs/2503.18225))"
    )
    lora_rank = "r"
    axes: ClassVar[Mapping[str, Axes]] = {"A": ("r", "in"), "B": ("out", "r"), "lambda": (1,), "w_norm": ("in",)}
    peft = PeftForm(
        peft_type="DELORA",
        parameters={"delora_A": "A", "delora_B": "B", "delora_lambda": "lambda", "delora_w_norm": "w_norm"},
        mark="delora_",
        fields=("r",),
        inert=("delora_lambda", "module_dropout", "lambda_pattern", "rank_pattern"),
        settings=_settings,
    )

    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """See `LowRank.up_and_down`."""
        a, b = self.theta["A"], self.theta["B"]
        norms = [torch.linalg.vector_norm(factor, dim=dim).clamp(min=_LEAST_NORM) for factor, dim in ((a, 1), (b, 0))]
        strength = self.theta["lambda"] / len(a) / (norms[0] * norms[1])
        return b * strength, a * self.theta["w_norm"]
