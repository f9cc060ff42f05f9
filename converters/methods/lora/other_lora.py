"""LoRA on what is not a linear layer: on embeddings and on convolutions.

`W0 + s·(BA)ᵀ` for an embedding (vocabulary, in), with A (r, vocabulary) and B (in, r); for a convolution A is one
with r outputs and B one with a kernel of size 1, so that `W0 + s·BA` holds for the weights as matrices (out, in·k·k).
Source: HF PEFT's `peft/tuners/lora/layer.py` (`Embedding`, `_ConvNd`). They have factors, but the layout of a LoRA
adapter for linear layers, which `--format lora` writes, has no place for them.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from converters.errors import BaseMismatchError, ThetaError
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes
from converters.methods.weight_delta import Reads


@dataclass(frozen=True, eq=False)
class _OtherLora(RowWise):
    """θ of one module: A and B, and s."""

    @property
    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Two factors (out, r) and (r, in) of the delta, as the weight is stored, not multiplied by `weight`."""

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.NOTHING

    @property
    def facts(self) -> dict[str, Any]:
        """See `Method.facts`."""
        return {"method": self.name, "r": self.sizes["r"], **self.settings}

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        up, down = self.factors
        return up[which] @ down

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`."""
        up, down = self.factors
        up, down = up[rows] * self.weight, down[:, columns]
        return up @ down, up.abs() @ down.abs()


@dataclass(frozen=True, eq=False)
class EmbeddingLora(_OtherLora):
    """LoRA on an embedding."""

    name = "lora-embedding"
    formula = "`W = W0 + s·(B·A)ᵀ` (LoRA on an embedding, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685))"
    remark = "A tied output head is untied, as in PEFT, unless trained with `ensure_weight_tying`"
    axes: ClassVar[Mapping[str, Axes]] = {"A": ("r", "out"), "B": ("in", "r")}

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """See `_OtherLora.factors`."""
        return self.theta["A"].T * self.given["scaling"], self.theta["B"].T

    @property
    def keeps_ties(self) -> bool:
        """See `Method.keeps_ties`."""
        return bool(self.given.get("keeps_ties"))

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "is of an embedding, and the lora format is for linear layers"


@dataclass(frozen=True, eq=False)
class ConvLora(_OtherLora):
    """LoRA on a convolution, of 1 to 3 dimensions."""

    name = "lora-convolution"
    formula = "`W = W0 + s·B·A` (LoRA on a convolution, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685))"
    remark = "Not with groups, dilation or padding other than zeros: what PEFT trains there fits no weight"
    axes: ClassVar[Mapping[str, Axes]] = {}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """See `StoredMethod.sizes`. Raises `ThetaError` when A and B do not fit each other."""
        return convolution_sizes(self.theta["A"], self.theta["B"])

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """See `_OtherLora.factors`."""
        return self.theta["B"].flatten(1) * self.given["scaling"], self.theta["A"].flatten(1)

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "is of a convolution, and the lora format is for linear layers"

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`: the kernel as well, and no groups."""
        check_kernel(self.theta["A"], self.sizes["out"], shape, name)


def convolution_sizes(factor_a: Tensor, factor_b: Tensor) -> dict[str, int]:
    """The sizes of the factors of a convolution as matrices. Raises `ThetaError` when they do not fit each other."""
    a, b = tuple(factor_a.shape), tuple(factor_b.shape)
    if not 3 <= len(a) == len(b) <= 5 or a[0] != b[1] or set(b[2:]) != {1} or 0 in (*a, *b):
        raise ThetaError(
            f"A has shape {a}, B has shape {b}; expected A (r, in, *kernel), B (out, r, 1, ...){_groups(a, b)}"
        )
    return {"out": b[0], "in": math.prod(a[1:]), "r": a[0]}


def check_kernel(factor_a: Tensor, out: int, shape: tuple[int, ...], name: str) -> None:
    """Raise `BaseMismatchError` unless a weight has the inputs and the kernel of A, and `out` outputs."""
    wanted = (out, *factor_a.shape[1:])
    if tuple(shape) != wanted:
        raise BaseMismatchError(
            f"{name}: the weight has shape {tuple(shape)}, θ was trained for {wanted} without groups; with "
            "groups, PEFT's update is not a convolution of the same kind; else this is another base"
        )


def _groups(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    """The end of a message, if the shapes are those of a convolution with groups, as wav2vec2 has for positions."""
    if len(b) < 3 or not 0 < b[1] < a[0] or a[0] % b[1]:
        return ""
    return (
        f". It is of a convolution with {a[0] // b[1]} groups, where PEFT's update of an output reads the inputs of "
        "all groups, and the weight only those of its own: no weight does the same, and PEFT does not merge it "
        "either; use the adapter in PEFT, unmerged, or train without this module in target_modules"
    )
