"""(IA)³: the outputs, or the inputs, of a module are multiplied by a trained vector l.

`W = diag(l) W0` and `b = l ⊙ b0` where it scales the outputs; `W = W0 diag(l)` where it scales the inputs (PEFT's
`feedforward_modules`). Source: arXiv 2205.05638; HF PEFT's `peft/tuners/ia3/layer.py`. The delta has the rank of W0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from converters.errors import ThetaError
from converters.methods.base import Method
from converters.methods.peft_form import PeftForm, Shapes
from converters.methods.update import Update
from converters.methods.weight_delta import Reads, WeightShape


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    """Outputs or inputs: the shape of l says it, (out, 1) or (1, in)."""
    shape = shapes["l"]
    if len(shape) != 2 or 1 not in shape:
        raise ThetaError(f"{module}: ia3_l has shape {shape}; expected (out, 1) or (1, in), as of a linear layer")
    if shape == (1, 1):
        raise ThetaError(f"{module}: ia3_l has shape (1, 1), which does not say whether it scales outputs or inputs")
    return {"scales": "inputs" if shape[0] == 1 else "outputs"}


@dataclass(frozen=True, eq=False)
class Ia3(Method):
    """θ of one module.

    Attributes:
        vector: l, (out, 1) or (1, in).
        scales: `outputs` or `inputs` of the module.
        is_transposed: for a weight that is stored as (in, out).

    Raises `ThetaError` when l has another shape.
    """

    name = "ia3"
    formula = "`W = l ⊙ W0` ((IA)³, [arXiv 2205.05638](https://arxiv.org/abs/2205.05638))"
    remark = "Biases, too, where it scales outputs"
    peft = PeftForm(
        peft_type="IA3",
        parameters={"ia3_l": "l"},
        mark="ia3_",
        inert=("feedforward_modules", "init_ia3_weights"),
        settings=_settings,
    )

    vector: Tensor
    scales: str
    is_transposed: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.vector.shape)
        if len(shape) != 2 or shape[1 if self.scales == "outputs" else 0] != 1:
            wanted = "(out, 1)" if self.scales == "outputs" else "(1, in)"
            raise ThetaError(f"l has shape {shape}; expected {wanted}")

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Ia3":
        """From l; see `Method.from_parts`."""
        return cls(parts["l"], settings["scales"])

    @property
    def parts(self) -> dict[str, Tensor]:
        """See `WeightDelta.parts`."""
        return {"l": self.vector}

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return {"scales": self.scales}

    @property
    def kind(self) -> str:
        """See `WeightDelta.kind`."""
        return f"{super().kind} transposed {self.is_transposed}"

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        size = self.vector.numel()
        return (size, None) if (self.scales == "outputs") != self.is_transposed else (None, size)

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.ROWS

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return f"scales the {self.scales} of the whole weight (IA3), so it is not of low rank"

    @property
    def bias(self) -> "Ia3 | None":
        """See `Method.bias`: the outputs include it."""
        return Ia3(self.vector, self.scales) if self.scales == "outputs" else None

    def with_parts(self, parts: Mapping[str, Tensor]) -> "Ia3":
        """See `WeightDelta.with_parts`."""
        return Ia3(parts["l"], self.scales, self.is_transposed)

    def transposed(self) -> "Ia3":
        """See `WeightDelta.transposed`."""
        return Ia3(self.vector, self.scales, not self.is_transposed)

    @property
    def change(self) -> Tensor:
        """`l − 1`, (n, 1) or (1, n) as the weight is stored."""
        return (self.vector.T if self.is_transposed else self.vector) - 1

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        return w0 * self.change

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: `w0` has whole rows."""
        change = self.change
        found = w0[:, columns] * (change[rows] if change.shape[1] == 1 else change[:, columns])
        return found, found.abs()

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> "Ia3Update":
        """See `WeightDelta.update`."""
        return Ia3Update(self.with_parts(self.parts_on(device, dtype)).change, dtype, device)


class Ia3Update(Update):
    """Numbers are scaled as they pass by."""

    def __init__(self, change: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._change = change

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Rows of the delta."""
        by_row = self._change.shape[1] == 1
        return w0 * (self._change[start : start + w0.shape[0]] if by_row else self._change)
