"""HRA: `W = W0 H1 H2 ... Hr`, reflections `H = I − 2 u uᵀ` of the inputs; once W0 is known, a LoRA of rank r.

With U the unit vectors as columns, the product is `I − U T Uᵀ` for an upper triangular T, so that the delta is
`−(W0 U) (T Uᵀ)`. With `apply_GS` the vectors are made orthogonal in order (Gram-Schmidt), and `T = 2 I`.
Source: arXiv 2405.17484; HF PEFT's `peft/tuners/hra/layer.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import ThetaError
from converters.methods.factors import Factors
from converters.methods.peft_form import PeftForm, Shapes, rank_of
from converters.methods.row_wise import RowsUpdate, RowWise, Which
from converters.methods.shapes import Axes
from converters.methods.update import Update


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    rank_of(config, module, shapes["u"][-1])
    return {"apply_GS": bool(config["apply_GS"])}


@dataclass(frozen=True, eq=False)
class Hra(RowWise):
    """θ of one module: u (in, r), one vector a column, of any length."""

    name = "hra"
    formula = "`W = W0·∏(I − 2·u·uᵀ)` (HRA, [arXiv 2405.17484](https://arxiv.org/abs/2405.17484))"
    lora_rank = "r"
    remark = "Also `apply_GS`"
    axes: ClassVar[Mapping[str, Axes]] = {"u": ("in", "r")}
    peft = PeftForm(
        peft_type="HRA",
        parameters={"hra_u": "u"},
        mark="hra_",
        fields=("r", "apply_GS"),
        settings=_settings,
    )

    @property
    def rank(self) -> int:
        """See `WeightDelta.rank`."""
        return self.sizes["r"]

    @cached_property
    def reflection(self) -> tuple[Tensor, Tensor]:
        """U (in, r) and `−T Uᵀ` (r, in): the product of all reflections is `I + U (−T Uᵀ)`."""
        u = self.theta["u"]
        if self.given["apply_GS"]:
            units = _orthonormal(u)
            return units, -2 * units.T
        units = u / torch.linalg.vector_norm(u, dim=0)
        return units, -_triangle(units) @ units.T

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        units, right = self.reflection
        return (w0 @ units) @ right

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Update:
        """See `WeightDelta.update`."""
        return HraUpdate(self.with_parts(self.parts_on(device, dtype)), dtype, device)


class HraUpdate(RowsUpdate):
    """As of every method that goes by rows; its factors depend on W0."""

    def __init__(self, theta: Hra, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(theta, dtype, device)
        self._units, self._right = theta.reflection
        self._weight = theta.weight

    def factors(self, blocks: Iterable[Tensor]) -> Factors:
        """See `Update.factors`."""
        up = torch.cat([w0 @ self._units for _, w0 in self._numbered(blocks)])
        return Factors(up * self._weight, self._right)


def _triangle(units: Tensor) -> Tensor:
    """T (r, r), column by column: `(I − U T Uᵀ)(I − 2 u uᵀ)` adds the column `−2 T Uᵀ u` above a 2."""
    r = units.shape[1]
    t = units.new_zeros(r, 0)
    for i in range(r):
        above = -2 * t[:i] @ (units[:, :i].T @ units[:, i : i + 1])
        column = torch.cat([above, units.new_full((1, 1), 2.0), units.new_zeros(r - i - 1, 1)])
        t = torch.cat([t, column], dim=1)
    return t


def _orthonormal(vectors: Tensor) -> Tensor:
    """The columns made orthogonal, in order, and of length 1. Raises `ThetaError` when they are dependent."""
    found: list[Tensor] = []
    for vector in vectors.unbind(1):
        rest = vector
        for one in found:
            rest = rest - (one @ rest) * one
        length = torch.linalg.vector_norm(rest)
        if not torch.compiler.is_exporting() and length.device.type != "meta" and not length > 0:
            raise ThetaError("the vectors of HRA are not independent, and apply_GS makes them orthogonal")
        found.append(rest / length)
    return torch.stack(found, dim=1)
