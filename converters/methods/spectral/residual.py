"""PiSSA and OLoRA as they were trained: LoRA on a base from which its initial product was taken away.

`W = W0 − s·B0 A0 + s·B A`, where B0 A0 is what A and B began with. It is computed again from W0: with PiSSA,
`s·B0 A0 = U S V`, the r largest singular parts of W0, whose signs cancel out; with OLoRA, `B0 = Q` and `A0 = Qᵀ W0`,
where Q is an orthonormal basis of the first r columns of W0. Once W0 is known, that is a LoRA of rank 2r.

HF PEFT rounds the base of the training, `W0 − s·B0 A0`, to the dtype of the model, which is not recorded; here it is
not rounded. W0 has to be the base as it was before: one that was trained on, and saved, lacks B0 A0 already.
Source: arXiv 2404.02948, arXiv 2406.01775; HF PEFT's `peft/tuners/lora/layer.py`, `pissa_init` and `olora_init`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from converters.errors import BaseMismatchError, ConversionError, ThetaError
from converters.methods.peft_form import PeftForm
from converters.methods.shapes import Axes
from converters.methods.spectral.decomposed import Decomposed, check_cut, left_axes

# between B A and B0 A0: training turns a product by some degrees, and that of another base is about at right angles
LEAST_COSINE = 0.25

# what a column of W0 adds to those before it, beside the most: below it, float32 decides the direction
_INDEPENDENT = 1e-3
_PARAMETERS = {"lora_A": "A", "lora_B": "B"}


@dataclass(frozen=True, eq=False)
class ResidualLora(Decomposed):
    """θ of one module: A (r, in), B (out, r). A subclass says what was taken away."""

    lora_rank = "2r"
    axes: ClassVar[Mapping[str, Axes]] = {"A": ("r", "in"), "B": ("out", "r")}

    @abstractmethod
    def taken(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        """(out, r) and (r, in) whose product was taken away from W0 (out, in).

        Raises `ConversionError` when W0 does not determine it.
        """

    @property
    def rank(self) -> int:
        """See `WeightDelta.rank`."""
        return 2 * self.sizes["r"]

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        if sizes["r"] > min(sizes["out"], sizes["in"]):
            raise ThetaError(f"r = {sizes['r']} is more than a weight of these sizes has parts: {dict(sizes)}")

    def up_and_down(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decomposed.up_and_down`. Raises `BaseMismatchError` when θ did not begin with parts of this W0."""
        before = self.taken(w0)
        a, b = self.theta["A"], self.theta["B"]
        found = _cosine((b, a), before) * (1 if self.given["scaling"] > 0 else -1)
        if found < LEAST_COSINE:
            raise BaseMismatchError(
                f"what was trained has a cosine of {found:.2f} with what {self.name} takes from W0, where it began: "
                "this is not the base, or it lacks that part already; give the base as it was before the training"
            )
        return torch.cat([b * self.given["scaling"], -before[0]], dim=1), torch.cat([a, before[1]])


@dataclass(frozen=True, eq=False)
class Pissa(ResidualLora):
    """θ of one module: A (r, in), B (out, r), which began with the largest singular parts of W0."""

    name = "pissa"
    formula = (
        "`W = W0 − U·S·V + s·B·A`, U·S·V ≈ W0 of rank r (PiSSA, [arXiv 2404.02948](https://arxiv.org/abs/2404.02948))"
    )
    remark = "The base has to be the one before the training. `pissa_niter_*` is refused: it draws random numbers"
    peft = PeftForm("LORA", _PARAMETERS, mark="lora_", when={"init_lora_weights": "pissa"})

    def taken(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        """See `ResidualLora.taken`."""
        r, is_wide = self.sizes["r"], w0.shape[0] <= w0.shape[1]
        axes, values = left_axes(w0 if is_wide else w0.T)
        check_cut(values, r, "what PiSSA took from it")
        axes = axes[:, :r]
        return (axes, axes.T @ w0) if is_wide else (w0 @ axes, axes.T)


@dataclass(frozen=True, eq=False)
class Olora(ResidualLora):
    """θ of one module: A (r, in), B (out, r), which began with a QR decomposition of W0."""

    name = "olora"
    formula = (
        "`W = W0 − s·Q·Qᵀ·W0 + s·B·A`, Q of r columns of W0 (OLoRA, "
        "[arXiv 2406.01775](https://arxiv.org/abs/2406.01775))"
    )
    remark = "The base has to be the one before the training. Not on Conv1D"
    peft = PeftForm("LORA", _PARAMETERS, mark="lora_", when={"init_lora_weights": "olora"})

    def transposed(self) -> Self:
        """Raises `ThetaError`: HF PEFT decomposes such a weight as it is stored, and the result does not fit it."""
        raise ThetaError("OLoRA is not defined for weights that are stored transposed (Conv1D)")

    def taken(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        """See `ResidualLora.taken`."""
        q, triangle = torch.linalg.qr(w0[:, : self.sizes["r"]])
        sizes = triangle.diagonal().abs()
        if sizes.min() <= _INDEPENDENT * sizes.max():
            raise ConversionError(
                f"the first {self.sizes['r']} columns of W0 are dependent in float32, so what OLoRA took from it is "
                "not determined; convert the adapter with PEFT where it was trained"
            )
        return q * self.given["scaling"], q.T @ w0


def _cosine(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The cosine between two products of factors, as vectors of their numbers; 0 where one is 0."""
    (b, a), (d, c) = one, other
    product = ((b.T @ d) * (a @ c.T)).sum()
    lengths = ((b.T @ b) * (a @ a.T)).sum() * ((d.T @ d) * (c @ c.T)).sum()
    return float(product / lengths.sqrt()) if float(lengths) > 0 else 0.0
