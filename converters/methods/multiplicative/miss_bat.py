"""MiSS with `init_weights: bat`: `W = W0 + W0 B + B` in blocks of r × r, one B for all blocks of the same rows.

Source: arXiv 2409.15371; HF PEFT's `peft/tuners/miss/layer.py`, `get_delta_weight`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import BaseMismatchError
from converters.methods.peft_form import PeftForm, Shapes, rank_of
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes
from converters.methods.weight_delta import WeightShape


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    rank_of(config, module, shapes["block"][-1])
    return {}


@dataclass(frozen=True, eq=False)
class MissBat(RowWise):
    """θ of one module: B (out / r, r, r)."""

    name = "miss-bat"
    formula = "`W = W0 + W0·B + B` by blocks (MiSS bat, [arXiv 2409.15371](https://arxiv.org/abs/2409.15371))"
    axes: ClassVar[Mapping[str, Axes]] = {"block": ("out/r", "r", "r")}
    peft = PeftForm(
        peft_type="MISS",
        when={"init_weights": "bat"},
        parameters={"miss_block": "block"},
        mark="miss_",
        fields=("r", "init_weights"),
        inert=("miss_dropout", "mini_r"),
        settings=_settings,
    )

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        return self.sizes["out/r"] * self.sizes["r"], None

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "multiplies all of W0 (MiSS bat), so it is not of low rank"

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`."""
        super().check_fits(shape, name)
        if shape[1] % self.sizes["r"]:
            raise BaseMismatchError(
                f"{name}: the weight has in = {shape[1]}, no multiple of r = {self.sizes['r']} (MiSS); this is "
                "another base"
            )

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        block, r = self.theta["block"], self.sizes["r"]
        numbers = torch.arange(len(block) * r, device=w0.device)[which]
        pieces = w0.reshape(len(w0), -1, r)  # (n, in / r, r)
        added = block[numbers // r, numbers % r]  # (n, r)
        return (torch.einsum("nqk,nkc->nqc", pieces, block[numbers // r]) + added[:, None]).reshape(w0.shape)
