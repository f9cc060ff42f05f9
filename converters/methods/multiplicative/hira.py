"""HiRA: `W = W0 + W0 ⊙ (B A)`: every number of W0 is scaled by one of a low-rank matrix.

Source: "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation" (ICLR 2025); HF PEFT's `peft/tuners/hira/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from converters.methods.peft_form import PeftForm, Shapes, rank_of
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    if shapes["A"][0] != config["r"]:  # PEFT 0.21 saves `rank_pattern`, and trains with r all the same
        rank_of(config, module, shapes["A"][0])
    return {}


@dataclass(frozen=True, eq=False)
class HiRa(RowWise):
    """θ of one module: A (r, in), B (out, r)."""

    name = "hira"
    formula = "`W = W0 + W0 ⊙ (B·A)` ([HiRA](https://openreview.net/forum?id=TwJrTz9cRS))"
    axes: ClassVar[Mapping[str, Axes]] = {"A": ("r", "in"), "B": ("out", "r")}
    peft = PeftForm(
        peft_type="HIRA",
        parameters={"hira_A": "A", "hira_B": "B"},
        mark="hira_",
        fields=("r",),
        inert=("hira_dropout", "rank_pattern"),
        settings=_settings,
    )

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "scales every number of W0 by another one (HiRA), so it is not of low rank"

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        return w0 * (self.theta["B"][which] @ self.theta["A"])
