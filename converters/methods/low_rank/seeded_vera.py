"""VeRA and PVeRA whose random projections were not saved (`save_projection=False`): they are drawn again.

HF PEFT draws A (rows, in) and then B (out, r) from one generator that is seeded with `projection_prng_key`, for the
largest sizes of all adapted weights, which the base says. Source: HF PEFT's `peft/tuners/vera/model.py`,
`peft/tuners/pvera/model.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import ConversionError, ThetaError
from converters.methods.low_rank.vera import Pvera, Vera, check_mean
from converters.methods.peft_form import PeftForm, Shapes, integer, rank_of
from converters.methods.shapes import Axes
from converters.methods.weight_delta import WeightDelta

# what torch draws first for the seed 0
_FIRST = (0.49625658988952637, 0.7682217955589294, 0.08847743272781372)
_DRAWN = "Drawn again for the shapes of the base"


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    rank_of(config, module, shapes["lambda_d"][0])
    return {"seed": integer(config, "projection_prng_key", low=0), "largest_out": None, "largest_in": None}


def _mean_settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    rank_of(config, module, shapes["lambda_d"][0] // 2)
    check_mean(config)
    return {"seed": integer(config, "projection_prng_key", low=0), "largest_out": None, "largest_in": None}


@dataclass(frozen=True, eq=False)
class SeededVera(Vera):
    """θ of one module: λb (out,) and λd (r,); the largest sizes of all adapted weights, once the base is known."""

    name = "vera-seeded"
    remark = _DRAWN
    axes: ClassVar[Mapping[str, Axes]] = {"lambda_b": ("out",), "lambda_d": ("r",)}
    peft = PeftForm(
        peft_type="VERA",
        when={"save_projection": False},
        parameters={"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"},
        mark="vera_",
        fields=("r", "projection_prng_key"),
        inert=("save_projection", "vera_dropout", "d_initial"),
        settings=_settings,
    )

    @classmethod
    def settings_of_base(cls, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
        """See `Method.settings_of_base`."""
        largest = (max(sizes) for sizes in zip(*shapes.values(), strict=True))
        return dict(zip(("largest_out", "largest_in"), largest, strict=True))

    @property
    def rank(self) -> int:
        """See `WeightDelta.rank`."""
        return self.sizes["r"]

    @property
    def rows(self) -> int:
        """How many rows A has."""
        return self.rank

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`."""
        WeightDelta.check_fits(self, shape, name)

    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """See `LowRank.up_and_down`. Raises `ConversionError` if nothing is known of the base."""
        lambda_b, lambda_d = self.theta["lambda_b"], self.theta["lambda_d"]
        if self.given["largest_in"] is None:
            raise ConversionError(
                "the projections of this adapter are drawn for the largest weights of its base, which is not known "
                "here; merge it, or save it with save_projection=True"
            )
        sizes = self.given["largest_out"], self.given["largest_in"]
        a, b = _projections(self.given["seed"], self.rows, self.rank, *sizes)
        up = lambda_b[:, None] * b[: self.sizes["out"]].to(lambda_b)
        return up, lambda_d[: self.rank, None] * a[: self.rank, :width].to(lambda_d)


@dataclass(frozen=True, eq=False)
class SeededPvera(SeededVera):
    """θ of one module: as of VeRA, with λd (2r,): r for the mean, r for the variance."""

    name = "pvera-seeded"
    formula = Pvera.formula
    axes: ClassVar[Mapping[str, Axes]] = {"lambda_b": ("out",), "lambda_d": ("2r",)}
    peft = PeftForm(
        peft_type="PVERA",
        when={"save_projection": False},
        parameters={"pvera_lambda_b": "lambda_b", "pvera_lambda_d": "lambda_d"},
        mark="pvera_",
        fields=("r", "sample_at_inference", "projection_prng_key"),
        inert=("save_projection", "pvera_dropout", "d_initial", "generator_seed"),
        settings=_mean_settings,
    )

    @property
    def rank(self) -> int:
        """See `WeightDelta.rank`."""
        return self.sizes["2r"] // 2

    @property
    def rows(self) -> int:
        """See `SeededVera.rows`."""
        return self.sizes["2r"]


@lru_cache(maxsize=2)
def _projections(seed: int, rows: int, rank: int, out: int, width: int) -> tuple[Tensor, Tensor]:
    """A (rows, width) and B (out, rank), float32. Raises `ThetaError` if this torch draws other numbers."""
    if torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist() != list(_FIRST):
        raise ThetaError(
            f"torch {torch.__version__} draws other numbers from a seed than the torch that the adapter was trained "
            "with, and its random projections were not saved; save it with save_projection=True where it was trained"
        )
    generator = torch.Generator().manual_seed(seed)
    return _uniform((rows, width), generator), _uniform((out, rank), generator)


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming's uniform initialisation."""
    bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
