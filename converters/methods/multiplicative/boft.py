"""BOFT: `W = s ⊙ (W0 Rᵀ)`, R a rotation of blocks of the inputs, s a trained scale of every output.

A block is the Cayley transform of the skew-symmetric part of what is trained. Several butterfly factors, which HF
PEFT trains with a CUDA extension only, are refused. Source: arXiv 2311.06243; HF PEFT's `peft/tuners/boft/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from converters.errors import ThetaError
from converters.methods.multiplicative.rotations import cayley, turn_blocks
from converters.methods.peft_form import PeftForm
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes
from converters.methods.weight_delta import WeightShape


@dataclass(frozen=True, eq=False)
class Boft(RowWise):
    """θ of one module: R (1, blocks, b, b) and s (out, 1)."""

    name = "boft"
    formula = "`W = s ⊙ (W0·Rᵀ)`, R orthogonal (BOFT, [arXiv 2311.06243](https://arxiv.org/abs/2311.06243))"
    remark = "One butterfly factor, which is all that PEFT has without its CUDA extension"
    axes: ClassVar[Mapping[str, Axes]] = {"R": ("factors", "blocks", "b", "b"), "s": ("out", 1)}
    peft = PeftForm(
        peft_type="BOFT",
        parameters={"boft_R": "R", "boft_s": "s"},
        mark="boft_",
        inert=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"),
    )

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        if sizes["factors"] != 1:
            raise ThetaError(
                f"boft_R has {sizes['factors']} butterfly factors, and only one is read here; merge it with PEFT's "
                "merge_and_unload on a GPU, where its CUDA extension runs"
            )

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        return self.sizes["out"], self.sizes["blocks"] * self.sizes["b"]

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "rotates all inputs (BOFT), so it is not of low rank"

    @cached_property
    def change(self) -> Tensor:
        """`R − I` of every block (blocks, b, b)."""
        trained = self.theta["R"][0]
        return cayley((trained - trained.transpose(1, 2)) / 2)

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        s = self.theta["s"][which]
        return (s - 1) * w0 + s * turn_blocks(w0, self.change)
