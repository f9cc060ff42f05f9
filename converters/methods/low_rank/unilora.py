"""Uni-LoRA: `W = W0 + B A`, whose numbers are those of one trained vector, by fixed indices and scales.

`A = θd[indices of A] · scales of A`, and B likewise. Source: arXiv 2506.00799; HF PEFT's
`peft/tuners/unilora/layer.py`, `model.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from converters.methods.low_rank.low_rank import LowRank
from converters.methods.peft_form import PeftForm, Shapes, rank_of, save_again
from converters.methods.shapes import Axes
from converters.methods.stored import check_indices


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    rank_of(config, module, shapes["indices_A"][0])
    return {}


@dataclass(frozen=True, eq=False)
class UniLora(LowRank):
    """θ of one module: indices and scales of A (r, in) and of B (out, r), and the vector θd of all modules."""

    name = "unilora"
    formula = (
        "`W = W0 + B·A`, picked from one vector (Uni-LoRA, [arXiv 2506.00799](https://arxiv.org/abs/2506.00799))"
    )
    lora_rank = "r"
    remark = "Needs `save_indices=True`, which is not PEFT's default"
    axes: ClassVar[Mapping[str, Axes]] = {
        "indices_A": ("r", "in"),
        "indices_B": ("out", "r"),
        "scales_A": ("r", "in"),
        "scales_B": ("out", "r"),
        "theta_d": ("d",),
    }
    integers = frozenset({"indices_A", "indices_B"})
    peft = PeftForm(
        peft_type="UNILORA",
        parameters={f"unilora_{part}": part for part in ("indices_A", "indices_B", "scales_A", "scales_B")},
        shared={"unilora_theta_d": "theta_d"},
        missing="the indices were not saved (save_indices is false, PEFT's default). They are drawn from proj_seed "
        "for all modules in turn, and NumPy does not promise that another version draws the same; "
        f"{save_again('save_indices')}",
        mark="unilora_",
        fields=("r",),
        inert=(
            "proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "save_indices",
        ),
        settings=_settings,
    )  # fmt: skip

    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """See `LowRank.up_and_down`."""
        return self._picked("B"), self._picked("A")

    def _picked(self, side: str) -> Tensor:
        """One factor."""
        indices = self.theta[f"indices_{side}"].long()
        check_indices(f"indices_{side}", indices, self.sizes["d"])
        return self.theta["theta_d"][indices] * self.theta[f"scales_{side}"]
