"""AdaLoRA: `W = W0 + s · B diag(E) A`, LoRA as a singular value decomposition whose small values were pruned.

`s = lora_alpha / (init_r + 1e-5)`: HF PEFT divides by the rank at the beginning of the training, not by the pruned
one, which is 0 for some modules. Of LoRA's settings it ignores `alpha_pattern`, `lora_bias` and `use_rslora`.
Source: arXiv 2303.10512; HF PEFT's `peft/tuners/adalora/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from converters.methods.low_rank.low_rank import LowRank
from converters.methods.peft_form import PeftForm, Shapes, number
from converters.methods.shapes import Axes


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    alpha, init_r = number(config, "lora_alpha"), number(config, "init_r")
    return {"scaling": (alpha if alpha > 0 else init_r) / (init_r + 1e-5)}


@dataclass(frozen=True, eq=False)
class AdaLora(LowRank):
    """θ of one module: A (r, in), B (out, r) and the singular values E (r, 1); r may be 0."""

    name = "adalora"
    formula = "`W = W0 + s·B·diag(E)·A` (AdaLoRA, [arXiv 2303.10512](https://arxiv.org/abs/2303.10512))"
    lora_rank = "r"
    remark = "A module whose rank was pruned to 0 is left as it is"
    axes: ClassVar[Mapping[str, Axes]] = {"A": ("r", "in"), "B": ("out", "r"), "E": ("r", 1)}
    may_be_empty = "r"
    peft = PeftForm(
        peft_type="ADALORA",
        parameters={"lora_A": "A", "lora_B": "B", "lora_E": "E"},
        mark="lora_",
        fields=("init_r", "lora_alpha"),
        inert=(
            "r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
            "rank_pattern", "alpha_pattern", "lora_bias", "use_rslora", "lora_dropout", "init_lora_weights",
            "loftq_config", "megatron_core",
            "qalora_group_size", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying",
        ),
        settings=_settings,
    )  # fmt: skip

    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """See `LowRank.up_and_down`: a module that was pruned to nothing has the factors of a delta of zeros."""
        a, b, e = self.theta["A"], self.theta["B"], self.theta["E"]
        if not len(a):
            return b.new_zeros(b.shape[0], 1), a.new_zeros(1, a.shape[1])
        return b * self.given["scaling"], a * e
