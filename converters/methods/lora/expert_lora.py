"""LoRA on one parameter that holds the weights of several experts, as HF PEFT trains it with `target_parameters`.

θ has r rows of lora_A and r columns of lora_B for each of E experts: `ΔW_e = s · B_e A_e`. The experts are the
slowest index of lora_A's rows, and the fastest of lora_B's columns (`peft/tuners/lora/layer.py`, `ParamWrapper`).
With one expert it is LoRA on a matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import BaseMismatchError, ThetaError
from converters.methods.peanut.theta import Orientation
from converters.methods.peanut.tweaker import Tweaker
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes
from converters.methods.weight_delta import Reads, WeightShape


@dataclass(frozen=True, eq=False)
class ExpertLora(RowWise):
    """θ of one parameter (E, out, in), or (E, in, out) where it is transposed; W0 is the matrix (E · out, in).

    Its settings are `scaling`, `experts`, `transposed`, and `peft_version`, which wrote it.
    """

    name = "expert-lora"
    formula = (
        "`W_e = W0_e + s·B_e·A_e` for each expert e (LoRA, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685))"
    )
    axes: ClassVar[Mapping[str, Axes]] = {"A": ("rank of all", "in"), "B": ("out", "rank of all")}

    @property
    def experts(self) -> int:
        """E."""
        return int(self.given["experts"])

    @property
    def expert_rank(self) -> int:
        """Rank of the delta of one expert."""
        return self.sizes["rank of all"] // self.experts

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter is (E, in, out)."""
        return bool(self.given["transposed"])

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        if sizes["rank of all"] % self.experts:
            raise ThetaError(
                f"A has {sizes['rank of all']} rows; expected as many for each of {self.experts} experts"
            )

    @property
    def expert_shape(self) -> tuple[int, int]:
        """Of the parameter at one expert."""
        out, width = self.sizes["out"], self.sizes["in"]
        return (width, out) if self.is_transposed else (out, width)

    @property
    def weight_shape(self) -> WeightShape:
        """Of the parameter as a matrix."""
        rows, width = self.expert_shape
        return rows * self.experts, width

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.NOTHING

    @property
    def full_rank_reason(self) -> str | None:
        """See `WeightDelta.full_rank_reason`."""
        return "has a pair of factors for each expert, not one"

    @property
    def facts(self) -> dict[str, Any]:
        """See `Method.facts`."""
        given = {key: value for key, value in self.given.items() if key not in ("transposed", "peft_version")}
        return {"method": self.name, "r": self.expert_rank, **given}

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """Raise `BaseMismatchError` unless θ was trained for a parameter of this shape."""
        trained = (self.experts, *self.expert_shape)
        if tuple(shape) not in (trained, *([trained[1:]] if self.experts == 1 else [])):
            raise BaseMismatchError(
                f"{name}: the parameter has shape {tuple(shape)}, θ was trained for {trained}; this is another base, "
                "or another model size"
            )

    def transposed(self) -> "ExpertLora":
        """The delta of a parameter that has in and out swapped, at each expert."""
        return replace(self, given={**self.given, "transposed": not self.is_transposed})

    def expert(self, index: int) -> Tweaker:
        """θ of one expert as plain LoRA, of its (out, in); (in, out) where the parameter is transposed."""
        a, b = self._factors(index)
        given = {"act_fn": "linear", "scaling": float(self.given["scaling"]) * self.weight}
        plain = Tweaker(Orientation.FREE, a, b, **given)  # type: ignore[arg-type]
        return plain.transposed() if self.is_transposed else plain

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`: of the matrix of all experts."""
        height = self.expert_shape[0]
        picked = torch.arange(which.start, which.stop) if isinstance(which, slice) else which.cpu()
        found = self.theta["A"].new_zeros(len(picked), self.expert_shape[1])
        for index in sorted(set((picked // height).tolist())):
            own = picked // height == index
            left, right = self._matrix(index)
            found[own.to(found.device)] = left[(picked[own] % height).to(left.device)] @ right
        return found * float(self.given["scaling"])

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: only the columns that are asked for are computed."""
        a, b = self.theta["A"], self.theta["B"]
        part = {"A": a, "B": b[columns]} if self.is_transposed else {"A": a[:, columns], "B": b}
        few = self.with_parts(part)
        sizes = self.with_parts({name: tensor.abs() for name, tensor in part.items()})
        return few.rows(w0, rows) * self.weight, (sizes.rows(w0, rows) * self.weight).abs()

    def _factors(self, index: int) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of one expert."""
        r = self.expert_rank
        return self.theta["A"][index * r : (index + 1) * r], self.theta["B"][:, index :: self.experts]

    def _matrix(self, index: int) -> tuple[Tensor, Tensor]:
        """The two factors of the delta of one expert as the parameter has it, without the scale."""
        a, b = self._factors(index)
        return (a.T, b.T) if self.is_transposed else (b, a)


def rows_of(delta: Tweaker, start: int, stop: int) -> Tweaker:
    """Rows of a plain LoRA, for a part of the weight that is stored as a tensor of its own."""
    return replace(delta, b=delta.b[start:stop])
