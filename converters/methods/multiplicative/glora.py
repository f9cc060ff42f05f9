"""GLoRA: `W = W0 + W0 ⊙ A + B`, and for a module with a bias `b = b0 + b0 ⊙ D + E + W0 · C`.

Each of A to E is a product of two factors (`lora`), a vector, a constant, or `none`, which HF PEFT saves as zeros;
C to E are `none` where the module has no bias. Source: arXiv 2306.07967; HF PEFT's `peft/tuners/glora/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from converters.errors import AdapterConfigError, ThetaError
from converters.methods.peft_form import PeftForm, Shapes, rank_of
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes, find_sizes
from converters.methods.weight_delta import WeightShape

# field of the config -> kind of path -> axes of its tensors; C is a column of as many rows as the weight has columns
_PATHS: dict[str, dict[str, dict[str, Axes]]] = {
    "config_A_B": {
        "lora": {"Xd": ("out", "r"), "Xu": ("r", "in")},
        "vector": {"X": ("out", 1)},
        "constant": {"X": (1,)},
        "none": {"zeros": ("out", "in")},
    },
    "config_C": {
        "lora": {"Xd": ("in", "r"), "Xu": ("r", 1)},
        "vector": {"X": ("in", 1)},
        "none": {"zeros": ("in", 1)},
    },
    "config_D_E": {"vector": {"X": ("out",)}, "constant": {"X": (1,)}, "none": {"zeros": ("out",)}},
}
_FIELDS = {letter: field for field in _PATHS for letter in field.removeprefix("config_").split("_")}
_PARTS = [f"{letter}.{name}" for letter in _FIELDS for name in ("Xd", "Xu", "X", "zeros")]


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    """The kind of each path: the config's, but for a bias that is not there, and which has `none`."""
    kinds = {}
    for letter, field in _FIELDS.items():
        if (kind := config[field]) not in tuple(_PATHS[field]):  # a tuple: it may be a list, which has no hash
            raise AdapterConfigError(f"{field} = {kind!r}; expected {', '.join(_PATHS[field])}")
        found = {part.partition(".")[2] for part in shapes if part.startswith(f"{letter}.")}
        kinds[letter] = "none" if letter in "CDE" and found == {"zeros"} else kind
        if found != set(_PATHS[field][kinds[letter]]):
            raise ThetaError(
                f"{module}: glora_{letter} has {sorted(found) or 'nothing'}, which is not what {field} = {kind!r} has"
            )
        if kinds[letter] == "lora":
            rank_of(config, module, shapes[f"{letter}.Xu"][0])
    return kinds


@dataclass(frozen=True, eq=False)
class _Paths(RowWise):
    """Some of A to E, as tensors `A.X` or `A.Xd` and `A.Xu` or `A.zeros`; `given` says of which kind each one is."""

    @cached_property
    def sizes(self) -> dict[str, int]:
        """See `StoredMethod.sizes`."""
        shapes = {part: tuple(tensor.shape) for part, tensor in self.theta.items()}
        axes = {letter: _PATHS[_FIELDS[letter]][kind] for letter, kind in self.given.items()}
        return find_sizes(shapes, {f"{letter}.{name}": of for letter in axes for name, of in axes[letter].items()})

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`: HF PEFT would compute with what stands in place of the zeros."""
        if torch.compiler.is_exporting():
            return
        for part, tensor in self.theta.items():
            if part.endswith(".zeros") and tensor.device.type != "meta" and bool(tensor.any()):
                raise ThetaError(f"glora_{part} contains other numbers than zeros; the adapter is damaged")

    def path(self, letter: str, which: Which = slice(None)) -> Tensor:
        """One of A to E, or rows of it: what broadcasts to its shape."""
        if self.given[letter] == "lora":
            return self.theta[f"{letter}.Xd"][which] @ self.theta[f"{letter}.Xu"]
        found = self.theta[f"{letter}.{'zeros' if self.given[letter] == 'none' else 'X'}"]
        return found if self.given[letter] == "constant" else found[which]

    def only(self, letters: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and kinds of some of A to E."""
        theta = {part: tensor for part, tensor in self.theta.items() if part[0] in letters}
        return theta, {letter: self.given[letter] for letter in letters}


@dataclass(frozen=True, eq=False)
class GLora(_Paths):
    """θ of one module: A to E."""

    name = "glora"
    formula = "`W = W0 + W0⊙A + B`, `b = b0 + b0⊙D + E + W0·C` (GLoRA, [arXiv 2306.07967](https://arxiv.org/abs/2306.07967))"
    remark = "Biases, too, and what they get through the weight"
    peft = PeftForm(
        peft_type="GLORA",
        parameters={f"glora_{part}": part for part in _PARTS},
        optional=frozenset(_PARTS),  # which are there follows from the kinds
        mark="glora_",
        fields=("r", *_PATHS),
        settings=_settings,
    )

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "multiplies the numbers of the weight one by one (GLoRA), so it is not of low rank"

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        return w0 * self.path("A", which) + self.path("B", which)

    @property
    def bias(self) -> "GLoraBias | None":
        """See `Method.bias`."""
        return GLoraBias(*self.only("DE")) if self.needs_bias else None

    @property
    def bias_from_weight(self) -> Tensor | None:
        """See `Method.bias_from_weight`."""
        return None if self.given["C"] == "none" else self.path("C")

    @property
    def needs_bias(self) -> bool:
        """See `Method.needs_bias`."""
        return any(self.given[letter] != "none" for letter in "CDE")


@dataclass(frozen=True, eq=False)
class GLoraBias(_Paths):
    """`b0 + b0 ⊙ D + E`, with a bias as a matrix (out, 1)."""

    name = "glora"
    formula = GLora.formula

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        return self.sizes.get("out"), 1

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        return w0 * self.path("D", which).reshape(-1, 1) + self.path("E", which).reshape(-1, 1)
