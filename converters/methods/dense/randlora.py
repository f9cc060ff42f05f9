"""RandLoRA: `W = W0 + s · Σ B_j Λ_j A Γ_j`, many random low-rank products that are frozen and shared, scaled by θ.

The bases are saved once, for the largest weight; a module takes the first numbers of each. A lies on the smaller side
of the weight, whichever that is. `s = randlora_alpha / r`. Source: arXiv 2502.00987; HF PEFT's
`peft/tuners/randlora/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import BaseMismatchError
from converters.methods.peft_form import PeftForm, Shapes, number, rank_of, save_again
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    return {"scaling": number(config, "randlora_alpha") / rank_of(config, module, shapes["lambda"][0])}


@dataclass(frozen=True, eq=False)
class RandLora(RowWise):
    """θ of one module: Λ (r, n) and Γ (n, smaller side); A (r, 1, side) and B (side, n, r) of all modules."""

    name = "randlora"
    formula = "`W = W0 + s·Σ B·Λ·A·Γ`, random bases (RandLoRA, [arXiv 2502.00987](https://arxiv.org/abs/2502.00987))"
    remark = "Needs `save_projection=True`, PEFT's default. For 16-bit outputs, its product is computed in float32"
    axes: ClassVar[Mapping[str, Axes]] = {
        "lambda": ("r", "n"),
        "gamma": ("n", "side"),
        "A": ("r", "bases of A", "side of A"),
        "B": ("side of B", "bases of B", "r"),
    }
    peft = PeftForm(
        peft_type="RANDLORA",
        parameters={  # HF PEFT saves the bases with every module, and once more
            "randlora_lambda": "lambda", "randlora_gamma": "gamma", "randlora_A": "A", "randlora_B": "B",
        },
        shared={"randlora_A": "A", "randlora_B": "B"},
        missing="the random bases were not saved (save_projection is false), and numbers drawn from a seed depend on "
        f"the version of torch; {save_again('save_projection')}",
        mark="randlora_",
        fields=("r", "randlora_alpha"),
        inert=("projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout"),
        settings=_settings,
    )  # fmt: skip

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "is a sum of many products (RandLoRA), so it is not of low rank"

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`."""
        super().check_fits(shape, name)
        sizes = self.sizes
        if min(shape) != sizes["side"] or sizes["side"] > sizes["side of A"] or max(shape) > sizes["side of B"]:
            raise BaseMismatchError(
                f"{name}: the weight has shape {shape}; θ was trained for one whose smaller side is {sizes['side']}, "
                f"with bases of up to {sizes['side of A']} and {sizes['side of B']}; this is another base"
            )

    @property
    def is_costly(self) -> bool:
        """A product of matrices of full rank."""
        return True

    def parts_on(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `WeightDelta.parts_on`. The bases keep their dtype: they are large, a sample needs little of them."""
        frozen = ("A", "B")
        return {part: one.to(device, one.dtype if part in frozen else dtype) for part, one in self.theta.items()}

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        if w0.shape[1] == self.sizes["side"]:
            product = self._large(which) @ self._all_small
        else:
            product = self._small(which).T @ self._all_large[: w0.shape[1]].T
        return product * float(self.given["scaling"])

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`."""
        if w0.shape[1] == self.sizes["side"]:
            left, right = self._large(rows), self._small(columns)
        else:
            left, right = self._small(rows).T, self._large(columns).T
        scale = float(self.given["scaling"]) * self.weight
        return left @ right * scale, left.abs() @ right.abs() * abs(scale)

    def _small(self, which: Which) -> Tensor:
        """Λ A Γ of all bases below each other, (r n, side), at some places of the smaller side."""
        a = self.theta["A"][:, : self.sizes["n"], which].to(self.theta["lambda"].dtype)
        return (self.theta["lambda"][:, :, None] * a * self.theta["gamma"][:, which]).flatten(0, 1)

    def _large(self, which: Which) -> Tensor:
        """B of all bases beside each other, (larger side, n r), at some places of the larger side."""
        return self.theta["B"][which, : self.sizes["n"]].flatten(1).to(self.theta["lambda"].dtype)

    @cached_property
    def _all_small(self) -> Tensor:
        return self._small(slice(0, self.sizes["side"]))

    @cached_property
    def _all_large(self) -> Tensor:
        return self._large(slice(None))
