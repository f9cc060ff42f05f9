"""MiSS: `W[o, i] = W0[o, i] + D[i mod r, o]`, one block (r, out) that is repeated along the inputs.

With `init_weights: mini` the block is (r, mini_r), and repeated along the outputs as well. As LoRA of rank r: lora_B
is the block, and lora_A copies its rows. `init_weights: bat` reads W0; it is in `multiplicative/miss_bat.py`.
Source: arXiv 2409.15371; HF PEFT's `peft/tuners/miss/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import BaseMismatchError
from converters.methods.low_rank.low_rank import LowRank
from converters.methods.peft_form import PeftForm, Shapes, rank_of
from converters.methods.shapes import Axes
from converters.methods.weight_delta import WeightShape


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    rank_of(config, module, shapes["block"][0])
    return {"mini": config["init_weights"] == "mini"}


@dataclass(frozen=True, eq=False)
class Miss(LowRank):
    """θ of one module: the block D (r, out), or (r, mini_r)."""

    name = "miss"
    formula = "`W[o, i] = W0[o, i] + D[i mod r, o]` (MiSS, [arXiv 2409.15371](https://arxiv.org/abs/2409.15371))"
    lora_rank = "r"
    remark = "Also `init_weights: mini`"
    axes: ClassVar[Mapping[str, Axes]] = {"block": ("r", "rows")}
    peft = PeftForm(
        peft_type="MISS",
        parameters={"miss_block": "block"},
        mark="miss_",
        fields=("r", "init_weights"),
        inert=("miss_dropout", "mini_r"),
        settings=_settings,
    )

    @property
    def module_shape(self) -> WeightShape:
        """See `LowRank.module_shape`: θ does not say how often the block is repeated."""
        return None if self.given["mini"] else self.sizes["rows"], None

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`."""
        super().check_fits(shape, name)
        out, width = shape[::-1] if self.is_transposed else shape
        if out % self.sizes["rows"] or width < self.sizes["r"]:
            raise BaseMismatchError(
                f"{name}: the weight has shape {shape}, and the block of MiSS, r = {self.sizes['r']}, "
                f"mini_r = {self.sizes['rows']}, does not tile it; this is another base"
            )

    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """See `LowRank.up_and_down`."""
        block = self.theta["block"]
        rows = torch.arange(out, device=block.device) % self.sizes["rows"]
        columns = torch.arange(width, device=block.device) % self.sizes["r"]
        copies = torch.eye(self.sizes["r"], dtype=block.dtype, device=block.device)
        return block[:, rows].T, copies[:, columns]
