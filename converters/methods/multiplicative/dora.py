"""DoRA: `W = m ⊙ (W0 + s · BA) / ‖W0 + s · BA‖`, a trained magnitude m for the normalised rows.

Source: arXiv 2402.09353; HF PEFT's `peft/tuners/lora/dora.py`. The norm is that of a row of the (out, in) weight.
Every row is divided by another number, so the delta has the rank of W0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from converters.errors import ThetaError
from converters.methods.base import Method
from converters.methods.peft_form import PeftForm
from converters.methods.update import Update
from converters.methods.weight_delta import Reads, WeightShape


@dataclass(frozen=True, eq=False)
class Dora(Method):
    """θ of one module.

    Attributes:
        a, b: the factors of LoRA, (r, in) and (out, r).
        magnitude: m, (out,).
        scaling: s.
        is_transposed: for a weight that is stored as (in, out): the norms are those of its columns.

    Raises `ThetaError` when the shapes do not fit each other.
    """

    name = "dora"
    formula = "`W = m ⊙ (W0 + s·BA) / ‖W0 + s·BA‖` (DoRA, [arXiv 2402.09353](https://arxiv.org/abs/2402.09353))"
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="LORA",
        flag="use_dora",
        parameters={"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "magnitude_vector"},
        mark="lora_",
    )

    a: Tensor
    b: Tensor
    magnitude: Tensor
    scaling: float
    is_transposed: bool = False

    def __post_init__(self) -> None:
        a, b, m = (tuple(part.shape) for part in (self.a, self.b, self.magnitude))
        if not (len(a) == len(b) == 2 and a[0] == b[1] > 0 and m == (b[0],)):
            raise ThetaError(f"A has shape {a}, B {b}, the magnitude {m}; expected (r, in), (out, r) and (out,)")

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """From A, B and magnitude_vector; see `Method.from_parts`."""
        return cls(parts["A"], parts["B"], parts["magnitude_vector"], settings["scaling"])

    @property
    def parts(self) -> dict[str, Tensor]:
        """See `WeightDelta.parts`."""
        return {"A": self.a, "B": self.b, "magnitude_vector": self.magnitude}

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return {"scaling": self.scaling}

    @property
    def facts(self) -> dict[str, Any]:
        """See `Method.facts`."""
        return {"method": self.name, "r": self.a.shape[0], "scaling": self.scaling}

    @property
    def kind(self) -> str:
        """See `WeightDelta.kind`."""
        return f"{super().kind} transposed {self.is_transposed}"

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        out, width = self.b.shape[0], self.a.shape[1]
        return (width, out) if self.is_transposed else (out, width)

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.COLUMNS if self.is_transposed else Reads.ROWS

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "divides every row by its norm (DoRA), so it is not of low rank"

    def with_parts(self, parts: Mapping[str, Tensor]) -> Self:
        """See `WeightDelta.with_parts`."""
        return replace(self, a=parts["A"], b=parts["B"], magnitude=parts["magnitude_vector"])

    def transposed(self) -> Self:
        """See `WeightDelta.transposed`."""
        return replace(self, is_transposed=not self.is_transposed)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """`s · left @ right` is the update of LoRA as the weight is stored."""
        return (self.a.T, self.b.T) if self.is_transposed else (self.b, self.a)

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        left, right = self.factors
        updated = w0 + self.scaling * (left @ right)
        norms: Tensor = torch.linalg.vector_norm(updated, dim=0 if self.is_transposed else 1)
        factor = self.magnitude / norms
        return updated * (factor if self.is_transposed else factor[:, None]) - w0

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: `w0` has whole rows, or whole columns where it is stored as (in, out)."""
        left, right = self.factors
        if self.is_transposed:
            left_of_w0, right_of_w0, magnitude = left, right[:, columns], self.magnitude[columns]
        else:
            left_of_w0, right_of_w0, magnitude = left[rows], right, self.magnitude[rows]
        picked = Dora.from_factors(left_of_w0, right_of_w0, magnitude, self)
        found = picked.delta(w0)
        spread = w0.abs() + found.abs() + abs(self.scaling) * (left_of_w0.abs() @ right_of_w0.abs())
        return (found[rows], spread[rows]) if self.is_transposed else (found[:, columns], spread[:, columns])

    @staticmethod
    def from_factors(left: Tensor, right: Tensor, magnitude: Tensor, like: "Dora") -> "Dora":
        """A part of another one's rows, or of its columns where the weight is stored as (in, out)."""
        a, b = (left.T, right.T) if like.is_transposed else (right, left)
        return Dora(a, b, magnitude, like.scaling, like.is_transposed)

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> "DoraUpdate":
        """See `WeightDelta.update`."""
        return DoraUpdate(self.with_parts(self.parts_on(device, dtype)), dtype)


class DoraUpdate(Update):
    """Rows of (out, in) are normalised as they pass by; columns of (in, out) need a pass before, for their norms."""

    def __init__(self, theta: Dora, dtype: torch.dtype) -> None:
        super().__init__(dtype, theta.a.device)
        self._theta = theta
        self._left, self._right = theta.factors
        self.needs_pass = theta.is_transposed
        self._squares = torch.zeros_like(theta.magnitude)

    def _updated(self, w0: Tensor, start: int) -> Tensor:
        left = self._left[start : start + w0.shape[0]]
        return torch.addmm(w0, left, self._right, alpha=self._theta.scaling)

    def see(self, w0: Tensor, start: int) -> None:
        """Add up the squares of every column."""
        self._squares += self._updated(w0, start).square().sum(0)

    def settle(self) -> None:
        """All rows were seen: the norms are known."""
        self._factor = self._theta.magnitude / self._squares.sqrt()

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Rows of the delta."""
        updated = self._updated(w0, start)
        if self.needs_pass:
            return updated.mul_(self._factor).sub_(w0)
        factor = self._theta.magnitude[start : start + w0.shape[0]] / torch.linalg.vector_norm(updated, dim=1)
        return updated.mul_(factor[:, None]).sub_(w0)
