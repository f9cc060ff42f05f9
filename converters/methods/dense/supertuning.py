"""Super-Tuning: `W = W0 + S`, S sparse: trained numbers at flat places that are saved with them.

With `r` it is the hybrid Supra: `W = W0 + S + s · B A`, s = lora_alpha / r. The places are those of the largest, or
smallest, numbers of |W0|, in the order of `torch.topk`. Equal magnitudes, of which 16-bit weights are full, have no
order of their own, so places that were not saved cannot be found again. Source: arXiv 2607.09287; HF PEFT's
`peft/tuners/supertuning/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import AdapterConfigError, BaseMismatchError, ThetaError
from converters.methods.dense.sparse import Sparse
from converters.methods.peft_form import PeftForm, Shapes, as_number, number, rank_of, save_again
from converters.methods.row_wise import Which
from converters.methods.shapes import Axes
from converters.methods.stored import check_indices


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    sparsity = number(config, "sparsity")
    if not 0 <= sparsity < 1:
        raise AdapterConfigError(f"sparsity = {sparsity:g}; expected a number from 0 to below 1")
    if config["r"] is None:
        if {"A", "B"} & set(shapes):
            raise ThetaError(f"{module}: θ has the factors of the hybrid Supra, but r is null in the config")
        return {"sparsity": sparsity, "scaling": None}
    if not {"A", "B"} <= set(shapes):
        raise ThetaError(
            f"{module}: r is {config['r']} (Supra), but supertuning_lora_A, supertuning_lora_B are missing"
        )
    rank = rank_of(config, module, shapes["A"][0])
    alpha = config.get("lora_alpha")
    return {"sparsity": sparsity, "scaling": (2 * rank if alpha is None else as_number("lora_alpha", alpha)) / rank}


@dataclass(frozen=True, eq=False)
class SuperTuning(Sparse):
    """θ of one module: numbers (n,) and their places in the flat weight (n,); of a hybrid A (r, in), B (out, r)."""

    name = "supertuning"
    formula = "`W = W0 + S (+ s·B·A)`, S sparse (Super-Tuning, [arXiv 2607.09287](https://arxiv.org/abs/2607.09287))"
    remark = "Also the hybrid with `r` (Supra). Needs `save_precomputed_indices=True`, PEFT's default"
    axes: ClassVar[Mapping[str, Axes]] = {"values": ("n",), "indices": ("n",), "A": ("r", "in"), "B": ("out", "r")}
    integers = frozenset({"indices"})
    peft = PeftForm(
        peft_type="SUPERTUNING",
        parameters={
            "supertuning_values": "values",
            "supertuning_indices": "indices",
            "supertuning_lora_A": "A",
            "supertuning_lora_B": "B",
        },
        optional=frozenset({"A", "B"}),
        missing="the adapter is incomplete. Without supertuning_indices (save_precomputed_indices is false) it "
        "cannot be merged: they come from sorting |W0|, where equal magnitudes have no order; "
        f"{save_again('save_precomputed_indices')}",
        mark="supertuning_",
        fields=("r", "sparsity"),
        inert=("lora_alpha", "lora_dropout", "select_top", "save_precomputed_indices"),
        settings=_settings,
    )

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "changes numbers here and there (Super-Tuning), so it is not of low rank"

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`: how many numbers were trained follows from the size of the weight."""
        super().check_fits(shape, name)
        wanted, found = int(shape[0] * shape[1] * (1 - self.given["sparsity"])), self.sizes["n"]
        if wanted != found:
            raise BaseMismatchError(
                f"{name}: the weight has shape {shape}, of which sparsity = {self.given['sparsity']} trains {wanted} "
                f"numbers, but θ has {found}; this is another base, or another config"
            )

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        values, places = self.theta["values"] * self.weight, self.theta["indices"].long()
        check_indices("supertuning_indices", places, w0.numel())
        flat = torch.zeros(w0.numel(), dtype=values.dtype, device=values.device)
        delta = flat.scatter_add_(0, places, values).view(w0.shape)  # as PEFT: a place that stands twice counts twice
        if "A" not in self.theta:
            return delta
        scale = float(self.given["scaling"]) * self.weight
        return delta.addmm_(self.theta["B"], self.theta["A"], alpha=scale)

    def entries(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """See `Sparse.entries`."""
        places = self.theta["indices"].long()
        check_indices("supertuning_indices", places, shape[0] * shape[1])
        return places, self.theta["values"]

    def dense_rows(self, which: Which) -> Tensor | None:
        """See `Sparse.dense_rows`: those of the hybrid Supra."""
        if "A" not in self.theta:
            return None
        return self.theta["B"][which] @ self.theta["A"] * float(self.given["scaling"])
