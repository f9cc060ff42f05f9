"""QALoRA: `W = W0 + s · B A P`, where P adds up the inputs in groups of g, and divides by g² / in.

HF PEFT computes it for GPTQ layers, takes `use_qalora` for plain LoRA elsewhere, and merges neither. Source:
arXiv 2309.14717; HF PEFT's `peft/tuners/lora/variants.py` (`QALoraLinearVariant`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from converters.methods.low_rank.low_rank import LowRank
from converters.methods.peft_form import PeftForm, Shapes, integer
from converters.methods.shapes import Axes
from converters.methods.weight_delta import WeightShape


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    return {"group_size": integer(config, "qalora_group_size", low=1)}


@dataclass(frozen=True, eq=False)
class QaLora(LowRank):
    """θ of one module: A (r, in/g) and B (out, r)."""

    name = "qalora"
    formula = "`W = W0 + s·BA·P`, P pools the inputs (QALoRA, [arXiv 2309.14717](https://arxiv.org/abs/2309.14717))"
    lora_rank = "r"
    remark = "As trained on GPTQ layers; into the same base, dequantized"
    axes: ClassVar[Mapping[str, Axes]] = {"A": ("r", "in/g"), "B": ("out", "r")}
    peft = PeftForm(
        peft_type="LORA",
        flag="use_qalora",
        parameters={"lora_A": "A", "lora_B": "B"},
        mark="lora_",
        fields=("qalora_group_size",),
        settings=_settings,
    )

    @property
    def module_shape(self) -> WeightShape:
        """See `LowRank.module_shape`."""
        return self.sizes["out"], self.sizes["in/g"] * self.given["group_size"]

    def _mismatch_cause(self, shape: tuple[int, ...]) -> str:
        """See `WeightDelta._mismatch_cause`."""
        return (
            "this is another base, or it was trained on layers that are not GPTQ, for which HF PEFT ignores "
            "use_qalora: set it to false in the config then"
        )

    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """See `LowRank.up_and_down`."""
        group = self.given["group_size"]
        down = self.theta["A"].repeat_interleave(group, dim=1) * (self.sizes["in/g"] / group)
        return self.theta["B"] * self.given["scaling"], down
