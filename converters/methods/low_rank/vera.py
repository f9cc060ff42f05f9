"""VeRA: `W = W0 + diag(λb) B diag(λd) A`, where A and B are random, frozen, and shared by all modules.

A module takes the first `in` columns of A and the first `out` rows of B. PVeRA samples `diag(λd) A x` while it is
trained; what it predicts with is the mean, the first half of its λd and of the rows of A.

Source: arXiv 2310.11454 (VeRA), 2512.07703 (PVeRA); HF PEFT's `peft/tuners/{vera,pvera}/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from converters.errors import AdapterConfigError, BaseMismatchError
from converters.methods.low_rank.low_rank import LowRank
from converters.methods.peft_form import PeftForm, Shapes, rank_of
from converters.methods.shapes import Axes


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    rank_of(config, module, shapes["lambda_d"][0])
    return {}


@dataclass(frozen=True, eq=False)
class Vera(LowRank):
    """θ of one module: λb (out,), λd (r,), and A (r, in or more), B (out or more, r) of all modules."""

    name = "vera"
    formula = "`W = W0 + diag(λb)·B·diag(λd)·A` (VeRA, [arXiv 2310.11454](https://arxiv.org/abs/2310.11454))"
    lora_rank = "r"
    axes: ClassVar[Mapping[str, Axes]] = {
        "lambda_b": ("out",),
        "lambda_d": ("r",),
        "A": ("r", "in of A"),
        "B": ("out of B", "r"),
    }
    peft = PeftForm(
        peft_type="VERA",
        parameters={"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"},
        shared={"vera_A": "A", "vera_B": "B"},
        mark="vera_",
        fields=("r",),
        inert=("projection_prng_key", "save_projection", "vera_dropout", "d_initial"),
        settings=_settings,
    )

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`."""
        super().check_fits(shape, name)
        width, most = shape[0 if self.is_transposed else 1], self.sizes["in of A"]
        if width > most or self.sizes["out"] > self.sizes["out of B"]:
            raise BaseMismatchError(
                f"{name}: the weight has in = {width}, the adapter's shared A only {most}; this is another base"
            )

    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """See `LowRank.up_and_down`."""
        r = self.sizes["r"]
        up = self.theta["lambda_b"][:, None] * self.theta["B"][: self.sizes["out"]]
        return up, self.theta["lambda_d"][:r, None] * self.theta["A"][:r, :width]


def _mean_settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    rank_of(config, module, shapes["lambda_d"][0] // 2)
    check_mean(config)
    return {}


def check_mean(config: Mapping[str, Any]) -> None:
    """Raise `AdapterConfigError` for a PVeRA that does not predict with the mean."""
    if config.get("sample_at_inference"):
        raise AdapterConfigError(
            "sample_at_inference is true: this adapter adds noise to every prediction, which no merged weight does; "
            "set it to false to merge the mean"
        )


@dataclass(frozen=True, eq=False)
class Pvera(Vera):
    """θ of one module: as of VeRA, with λd (2r,) and A (2r, in or more): r for the mean, r for the variance."""

    name = "pvera"
    formula = "`W = W0 + diag(λb)·B·diag(mean λd)·A` (PVeRA, [arXiv 2512.07703](https://arxiv.org/abs/2512.07703))"
    lora_rank = "r"
    remark = "`sample_at_inference` is refused"
    axes: ClassVar[Mapping[str, Axes]] = {
        "lambda_b": ("out",),
        "lambda_d": ("2r",),
        "A": ("2r", "in of A"),
        "B": ("out of B", "r"),
    }
    peft = PeftForm(
        peft_type="PVERA",
        parameters={"pvera_lambda_b": "lambda_b", "pvera_lambda_d": "lambda_d"},
        shared={"pvera_A": "A", "pvera_B": "B"},
        mark="pvera_",
        fields=("r", "sample_at_inference"),
        inert=("projection_prng_key", "save_projection", "pvera_dropout", "d_initial", "generator_seed"),
        settings=_mean_settings,
    )
