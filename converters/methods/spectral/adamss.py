"""AdaMSS: `W = W0 + P · (B_1 A_1; ...; B_K A_K) · V`, P putting the rows of K clusters back to their places.

V, the right singular vectors of (W0 | bias), is saved with A and B. The clusters are not: they come from a k-means of
the left singular vectors, and HF PEFT finds them again where it loads the adapter. So does this (`clusters.py`), and
refuses a V or sizes of clusters other than those that were saved. A module's bias is a column of its weight here:
the clusters depend on it, and it changes as the last column of the delta. Source: HF PEFT's
`peft/tuners/adamss/layer.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from converters.errors import BaseMismatchError, ConversionError, ThetaError
from converters.methods.peft_form import PeftForm, Shapes, integer
from converters.methods.shapes import Axes
from converters.methods.spectral.clusters import THREAD_COUNTS, Search, find_clusters
from converters.methods.spectral.decomposed import Decomposed
from converters.methods.weight_delta import WeightShape

_SAME = 4e-3  # how far singular vectors, of length 1, may be off: as far as rounding to bfloat16 moves them


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    numbers = sorted(int(found[1]) for part in shapes if (found := re.fullmatch(r"A\.(\d+)", part)))
    wanted = {"newB", *(f"{side}.{i}" for side in "AB" for i in range(len(numbers)))}
    if not numbers or shapes.keys() != wanted:
        raise ThetaError(
            f"{module}: θ has the parts {', '.join(sorted(shapes))}; expected newB, and A.i and B.i alike"
        )
    out, (r, width) = sum(shapes[f"B.{i}"][0] for i in numbers), shapes["newB"]
    count = integer(config, "num_subspaces", low=1)
    if len(numbers) != min(count, out):
        raise ThetaError(f"{module}: θ has {len(numbers)} clusters, the config says num_subspaces = {count}")
    if r != min(integer(config, "r", low=1), out, width):
        raise ThetaError(f"{module}: θ has r = {r}, the config says r = {config['r']}; they disagree")
    if max(shapes[f"A.{i}"][0] for i in numbers) > integer(config, "subspace_rank", low=1):
        raise ThetaError(f"{module}: θ has larger ranks than the config's subspace_rank = {config['subspace_rank']}")
    return {"clusters": count, "seed": integer(config, "random_seed", low=0)}


@dataclass(frozen=True, eq=False)
class Adamss(Decomposed):
    """θ of one module: A.i (r_i, r) and B.i (n_i, r_i) of every cluster, V (r, in), with a bias (r, in + 1), as newB.

    Attributes:
        of_bias: it changes the bias, the last column, instead of the weight.

    `on_module` adds the part `places`, the rows of all clusters.
    """

    name = "adamss"
    formula = "`W = W0 + P·(B₁·A₁; ...)·V`, by clusters of rows (AdaMSS)"
    lora_rank = "Σ r_i"
    remark = "Biases, too. Needs scikit-learn (`[peft]`), which finds the clusters of rows again"
    reads_module = True
    packages = ("scikit-learn",)
    axes: ClassVar[Mapping[str, Axes]] = {"newB": ("r", "width"), "places": ("out",)}
    integers = frozenset({"places"})
    peft = PeftForm(
        peft_type="ADAMSS",
        parameters={"adamss_A": "A", "adamss_B": "B", "adamss_newB": "newB"},
        optional=frozenset({"A", "B"}),
        mark="adamss_",
        fields=("r", "num_subspaces", "subspace_rank", "random_seed"),
        inert=(
            "use_dynamic_rank", "svd_threshold", "use_asa", "asa_target_subspaces", "init_warmup", "final_warmup",
            "mask_interval", "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent",
        ),
        settings=_settings,
    )  # fmt: skip

    of_bias: bool = False

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        for i in range(self.count):
            a, b = (tuple(self.theta[f"{side}.{i}"].shape) for side in "AB")
            if not (len(a) == len(b) == 2 and a[1] == sizes["r"] and a[0] == b[1] > 0):
                raise ThetaError(f"A.{i} has shape {a}, B.{i} {b}; expected (r_i, {sizes['r']}) and (rows, r_i)")

    @property
    def count(self) -> int:
        """How many clusters there are."""
        return sum(part.startswith("A.") for part in self.theta)

    @property
    def heights(self) -> tuple[int, ...]:
        """How many rows each cluster has."""
        return tuple(self.theta[f"B.{i}"].shape[0] for i in range(self.count))

    @property
    def module_shape(self) -> WeightShape:
        """See `Decomposed.module_shape`: the shapes do not say whether there is a bias."""
        return sum(self.heights), 1 if self.of_bias else None

    @property
    def rank(self) -> int:
        """See `WeightDelta.rank`."""
        return min(sum(self.theta[f"A.{i}"].shape[0] for i in range(self.count)), self.sizes["r"])

    @property
    def kind(self) -> str:
        """See `WeightDelta.kind`."""
        return f"{super().kind} of the bias {self.of_bias}"

    @property
    def bias(self) -> "Adamss":
        """See `Method.bias`."""
        return replace(self, of_bias=True)

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`."""
        super().check_fits(shape, name)
        width = self.sizes["width"]
        if not self.of_bias and shape[0 if self.is_transposed else 1] not in (width, width - 1):
            raise BaseMismatchError(
                f"{name}: the weight has shape {shape}, θ was trained for in = {width}, or 1 less"
            )

    def on_module(self, weight: Tensor, bias: Tensor | None) -> Self:
        """See `Method.on_module`.

        Raises:
            BaseMismatchError: the module has a bias, and θ was trained for one without; or the other way round.
            ConversionError: this machine, or this base, gives other clusters than the training had.
            MissingDependencyError: scikit-learn is not installed.
        """
        saved, width = self.theta["newB"], weight.shape[1] + (bias is not None)
        if saved.shape[1] != width:
            raise BaseMismatchError(
                f"the module has in = {weight.shape[1]} and {'a' if bias is not None else 'no'} bias; θ was trained "
                f"for {saved.shape[1]} columns, a bias included; this is another base"
            )
        for threads in THREAD_COUNTS:
            search = Search(self.sizes["r"], self.given["clusters"], self.given["seed"], threads)
            found = find_clusters(weight, bias, search)
            are_same = _distance(saved.cpu().double(), found.vectors.double()) <= _SAME
            if not are_same or found.sizes == self.heights:
                break
        if not are_same or found.sizes != self.heights:
            raise ConversionError(
                f"W0 has {'clusters of other sizes' if are_same else 'other singular vectors'} here than where the "
                "adapter was trained, so its rows cannot be told apart: it is another base, another torch or "
                "scikit-learn, or was trained on a GPU; merge it with PEFT there"
            )
        return replace(self, theta={**self.theta, "places": found.rows})

    def up_and_down(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decomposed.up_and_down`; `w0` is not read once the clusters are known."""
        if "places" not in self.theta:
            if self.sizes["width"] != w0.shape[1] or self.of_bias:
                raise ConversionError("AdaMSS on a module with a bias needs that bias: call `on_module` before")
            return self.on_module(w0, None).up_and_down(w0)
        parts = [self.theta[f"B.{i}"] for i in range(self.count)]
        blocks: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        left = torch.zeros_like(blocks).index_copy(0, self.theta["places"], blocks)
        middle = torch.cat([self.theta[f"A.{i}"] for i in range(self.count)])
        right = self.theta["newB"][:, -1:] if self.of_bias else self.theta["newB"][:, : w0.shape[1]]
        return (left, middle @ right) if len(middle) <= len(right) else (left @ middle, right)


def _distance(saved: Tensor, found: Tensor) -> float:
    """How far the vectors `saved` (r, in) lie from the span of `found`, which is all that a k-means depends on.

    Vectors of nearly equal singular values turn into each other by rounding. If they span everything, they are
    compared one by one.
    """
    near = found if len(found) == found.shape[1] else (saved @ found.T) @ found
    return float(torch.linalg.vector_norm(saved - near, dim=1).max())
