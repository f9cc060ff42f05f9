"""RandLoRA: `W = W0 + s · Σ B_j Λ_j A Γ_j`, many random low-rank products that are frozen and shared, scaled by θ.

The bases are saved once, for the largest weight; a module takes the first numbers of each. A lies on the smaller side
of the weight, whichever that is. `s = randlora_alpha / r`. Source: arXiv 2502.00987; HF PEFT's
`peft/tuners/randlora/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from converters.errors import BaseMismatchError
from converters.methods.peft_form import PeftForm, Shapes, number, rank_of
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    return {"scaling": number(config, "randlora_alpha") / rank_of(config, module, shapes["lambda"][0])}


@dataclass(frozen=True, eq=False)
class RandLora(RowWise):
    """θ of one module: Λ (r, n) and Γ (n, smaller side); A (r, 1, side) and B (side, n, r) of all modules."""

    name = "randlora"
    formula = "`W = W0 + s·Σ B·Λ·A·Γ`, random bases (RandLoRA, [arXiv 2502.00987](https://arxiv.org/abs/2502.00987))"
    remark = "Needs `save_projection=True`, PEFT's default"
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
        "the version of torch; save the adapter again with save_projection=True where it was trained",
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

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        sizes, theta, width = self.sizes, self.theta, w0.shape[1]
        scaled = theta["lambda"][:, :, None] * theta["A"][:, : sizes["n"], : sizes["side"]] * theta["gamma"]
        small = scaled.flatten(0, 1)
        large = theta["B"][:, : sizes["n"]].flatten(1)
        left, right = (large, small) if width == sizes["side"] else (small.T, large[:width].T)
        return (left[which] @ right) * float(self.given["scaling"])
