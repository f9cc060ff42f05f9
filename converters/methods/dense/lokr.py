"""LoKr: `W = W0 + s · w1 ⊗ w2`, a Kronecker product, each side whole or a product of two factors.

The rank is that of w1 times that of w2. `s = alpha / r`. Source: arXiv 2309.14859 (LyCORIS); HF PEFT's
`peft/tuners/lokr/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import ThetaError
from converters.methods.peft_form import PeftForm, Shapes, alpha_over_r
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes
from converters.methods.weight_delta import Reads, WeightShape


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    found = next((shapes[part][1] for part in ("w1_a", "w2_a") if part in shapes), None)
    return {"scaling": alpha_over_r(config, module, found)}


@dataclass(frozen=True, eq=False)
class LoKr(RowWise):
    """θ of one module: w1 (a, c), or w1_a (a, r) w1_b (r, c); w2 (b, d), or w2_a (b, r) w2_b (r, d).

    The weight is (a · b, c · d).
    """

    name = "lokr"
    formula = "`W = W0 + s·w1 ⊗ w2` (LoKr, [arXiv 2309.14859](https://arxiv.org/abs/2309.14859))"
    lora_rank = "rank w1 · rank w2"
    remark = "As LoRA where that is smaller than the weight"
    axes: ClassVar[Mapping[str, Axes]] = {
        "w1": ("a", "c"),
        "w1_a": ("a", "r1"),
        "w1_b": ("r1", "c"),
        "w2": ("b", "d"),
        "w2_a": ("b", "r2"),
        "w2_b": ("r2", "d"),
    }
    peft = PeftForm(
        peft_type="LOKR",
        parameters={f"lokr_{part}": part for part in axes},
        optional=frozenset(axes),
        mark="lokr_",
        fields=("r", "alpha"),
        inert=(
            "rank_dropout", "module_dropout", "use_effective_conv2d", "decompose_both", "decompose_factor",
            "rank_dropout_scale", "rank_pattern", "alpha_pattern",
        ),
        settings=_settings,
    )  # fmt: skip

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        for side in ("w1", "w2"):
            found = [part for part in self.axes if part.startswith(side) and part in self.theta]
            if found not in ([side], [f"{side}_a", f"{side}_b"]):
                raise ThetaError(
                    f"θ has {' and '.join(found) or 'nothing'} of {side}; expected it, or its two factors"
                )

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        return self.sizes["a"] * self.sizes["b"], self.sizes["c"] * self.sizes["d"]

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.NOTHING

    @property
    def _rank(self) -> int:
        sizes = self.sizes
        return sizes.get("r1", min(sizes["a"], sizes["c"])) * sizes.get("r2", min(sizes["b"], sizes["d"]))

    @property
    def rank(self) -> int | None:
        """See `WeightDelta.rank`."""
        sizes = self.sizes
        return self._rank if self._rank < min(sizes["a"] * sizes["b"], sizes["c"] * sizes["d"]) else None

    @property
    def full_rank_reason(self) -> str | None:
        """See `WeightDelta.full_rank_reason`."""
        return None if self.rank else f"has the rank {self._rank} (LoKr), no smaller than that of the weight"

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        w1, w2 = self._sides
        numbers = torch.arange(len(w1) * len(w2), device=w1.device)[which]
        left, right = w1[numbers // len(w2)] * float(self.given["scaling"]), w2[numbers % len(w2)]
        return (left[:, :, None] * right[:, None, :]).reshape(len(numbers), -1)

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: only these numbers are computed."""
        w1, w2 = self._sides
        b, d = w2.shape
        left, right = w1[rows // b][:, columns // d], w2[rows % b][:, columns % d]
        found = left * right * float(self.given["scaling"] * self.weight)
        return found, found.abs()

    @property
    def _sides(self) -> tuple[Tensor, Tensor]:
        """w1 and w2, whole."""
        w1, w2 = (self.theta[side] if side in self.theta else torch.mm(*self._factors(side)) for side in ("w1", "w2"))
        return w1, w2

    def few_factors(self) -> tuple[Tensor, Tensor]:
        """See `RowWise.few_factors`: `(u1 v1) ⊗ (u2 v2) = (u1 ⊗ u2) (v1 ⊗ v2)`."""
        (u1, v1), (u2, v2) = self._factors("w1"), self._factors("w2")
        return torch.kron(u1, u2) * self.given["scaling"], torch.kron(v1, v2)

    def _factors(self, side: str) -> tuple[Tensor, Tensor]:
        """One side as a product; where it is whole, with the identity of its smaller size."""
        if side not in self.theta:
            return self.theta[f"{side}_a"], self.theta[f"{side}_b"]
        whole = self.theta[side]
        identity = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
        return (identity, whole) if whole.shape[0] <= whole.shape[1] else (whole, identity)
