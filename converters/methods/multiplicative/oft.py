"""OFT: `W = W0 Rᵀ`, where R rotates blocks of the inputs.

A block is the Cayley transform of a skew-symmetric Q, `R = (I − Q)(I + Q)⁻¹`, or the first terms of its Neumann
series, `I + 2Q + 2Q² + ... + Qᵏ`, whose last term HF PEFT counts once. With `block_share` all blocks are the same;
with `coft` Q is shortened to the length eps / √blocks. Source: arXiv 2306.07280; HF PEFT's
`peft/tuners/oft/layer.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import AdapterConfigError, BaseMismatchError, ThetaError
from converters.methods.multiplicative.rotations import cayley, neumann, turn_blocks
from converters.methods.peft_form import PeftForm, Shapes, boolean, integer, number
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes
from converters.methods.weight_delta import WeightShape


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    if boolean(config, "use_cayley_neumann") and not config.get("peft_version"):
        raise AdapterConfigError(
            "peft_version is missing, so the adapter was saved before PEFT 0.18, which ended the Cayley-Neumann "
            "series in another way; merge it with the PEFT it was trained with"
        )
    neumann = integer(config, "num_cayley_neumann_terms", low=1) if config["use_cayley_neumann"] else None
    return {
        "block_share": boolean(config, "block_share"),
        "eps": number(config, "eps") if boolean(config, "coft") else None,
        "neumann_terms": neumann,
    }


@dataclass(frozen=True, eq=False)
class Oft(RowWise):
    """θ of one module: the numbers above the diagonal of every Q, (blocks, b (b − 1) / 2)."""

    name = "oft"
    formula = (
        "`W = W0·Rᵀ`, R block-diagonal and orthogonal (OFT, [arXiv 2306.07280](https://arxiv.org/abs/2306.07280))"
    )
    remark = "Saved by PEFT 0.18 or later, if with `use_cayley_neumann`"
    axes: ClassVar[Mapping[str, Axes]] = {"R": ("blocks", "numbers")}
    peft = PeftForm(
        peft_type="OFT",
        parameters={"oft_R": "R"},
        mark="oft_",
        fields=("use_cayley_neumann", "num_cayley_neumann_terms", "block_share", "coft", "eps"),
        inert=("r", "oft_block_size", "module_dropout"),
        settings=_settings,
    )

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        b = self.block_size
        if b * (b - 1) // 2 != sizes["numbers"] or (self.given["block_share"] and sizes["blocks"] != 1):
            raise ThetaError(f"R has shape ({sizes['blocks']}, {sizes['numbers']}); expected (blocks, b (b − 1) / 2)")

    @property
    def block_size(self) -> int:
        """b, the number of inputs that are rotated together."""
        return (1 + math.isqrt(1 + 8 * self.sizes["numbers"])) // 2

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        return None, None if self.given["block_share"] else self.sizes["blocks"] * self.block_size

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "rotates all inputs (OFT), so it is not of low rank"

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`."""
        super().check_fits(shape, name)
        if shape[1] % self.block_size:
            raise BaseMismatchError(
                f"{name}: the weight has in = {shape[1]}, which is no multiple of the blocks of OFT, "
                f"{self.block_size}; this is another base"
            )

    @cached_property
    def change(self) -> Tensor:
        """`R − I` of every block (blocks, b, b)."""
        b, vectors = self.block_size, self.theta["R"]
        rows, columns = torch.triu_indices(b, b, 1, device=vectors.device)
        q = vectors.new_zeros(len(vectors), b, b)
        q[:, rows, columns] = vectors
        q = q - q.transpose(1, 2)
        if self.given["eps"] is not None:
            longest = self.given["eps"] / math.sqrt(len(vectors))
            lengths = torch.linalg.matrix_norm(q, keepdim=True)
            q = torch.where(lengths <= longest, q, longest * q / lengths)
        if self.given["neumann_terms"] is not None:
            return neumann(q, self.given["neumann_terms"])
        return cayley(q)

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        return turn_blocks(w0, self.change)
