"""VB-LoRA: `W = W0 + B A`, whose rows and columns are mixtures of the vectors of a bank that all modules share.

Every piece of `l` numbers of A and of B is the softmax-weighted sum of the `topk` vectors with the largest logits.
With `save_only_topk_weights` HF PEFT saves indices and weights instead of logits, and of the weights all but the
last: they add up to 1. Source: arXiv 2405.15179; HF PEFT's `peft/tuners/vblora/layer.py`, `model.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import ThetaError
from converters.methods.low_rank.low_rank import LowRank
from converters.methods.peft_form import PeftForm, Shapes, integer, rank_of
from converters.methods.shapes import Axes
from converters.methods.stored import check_indices
from converters.methods.weight_delta import WeightShape


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    saved = {"indices_A", "weights_A", "indices_B", "weights_B"} if config.get("save_only_topk_weights") else None
    wanted = saved or {"logits_A", "logits_B"}
    if missing := sorted(wanted - shapes.keys()):
        raise ThetaError(f"{module}: vblora_{missing[0]} is missing; the adapter is incomplete")
    rank_of(config, module, shapes["indices_A" if saved else "logits_A"][0])
    return {"topk": integer(config, "topk", low=1)}


@dataclass(frozen=True, eq=False)
class VbLora(LowRank):
    """θ of one module: logits of A (r, in/l, n) and B (out/l, r, n), or their k largest; the bank (n, l) of all."""

    name = "vblora"
    formula = (
        "`W = W0 + B·A`, mixed from a bank of vectors (VB-LoRA, [arXiv 2405.15179](https://arxiv.org/abs/2405.15179))"
    )
    lora_rank = "r"
    remark = "With or without `save_only_topk_weights`"
    axes: ClassVar[Mapping[str, Axes]] = {
        "logits_A": ("r", "in/l", "n"),
        "logits_B": ("out/l", "r", "n"),
        "indices_A": ("r", "in/l", "k"),
        "weights_A": ("r", "in/l", "k-1"),
        "indices_B": ("out/l", "r", "k"),
        "weights_B": ("out/l", "r", "k-1"),
        "bank": ("n", "l"),
    }
    may_be_empty = "k-1"
    integers = frozenset({"indices_A", "indices_B"})
    peft = PeftForm(
        peft_type="VBLORA",
        parameters={
            "vblora_logits_A": "logits_A",
            "vblora_logits_B": "logits_B",
            "vblora_logits_A_topk_indices": "indices_A",
            "vblora_logits_A_topk_weights": "weights_A",
            "vblora_logits_B_topk_indices": "indices_B",
            "vblora_logits_B_topk_weights": "weights_B",
        },
        optional=frozenset({"logits_A", "logits_B", "indices_A", "weights_A", "indices_B", "weights_B"}),
        shared={"vblora_vector_bank": "bank"},
        mark="vblora_",
        fields=("r", "topk", "save_only_topk_weights"),
        inert=("num_vectors", "vector_length", "vblora_dropout", "init_vector_bank_bound", "init_logits_std"),
        settings=_settings,
    )

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        most, k = sizes["n"], sizes.get("k", self.given["topk"])
        if k != self.given["topk"] or k > most or sizes.get("k-1", k - 1) != k - 1:
            raise ThetaError(f"θ has the {k} largest of {most} logits; topk is {self.given['topk']}")

    @property
    def module_shape(self) -> WeightShape:
        """See `LowRank.module_shape`."""
        return self.sizes["out/l"] * self.sizes["l"], self.sizes["in/l"] * self.sizes["l"]

    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """See `LowRank.up_and_down`."""
        a, b = self._mixed("A"), self._mixed("B")
        return b.transpose(1, 2).reshape(-1, self.sizes["r"]), a.reshape(self.sizes["r"], -1)

    def _mixed(self, side: str) -> Tensor:
        """Pieces of one factor: (..., l)."""
        if f"logits_{side}" in self.theta:
            logits, indices = self.theta[f"logits_{side}"].topk(self.given["topk"], dim=-1)
            weights = logits.softmax(-1)
        else:
            indices, known = self.theta[f"indices_{side}"].long(), self.theta[f"weights_{side}"]
            check_indices(f"indices_{side}", indices, self.sizes["n"])
            weights = torch.cat([known, 1 - known.sum(-1, keepdim=True)], dim=-1)
        return (weights[..., None] * self.theta["bank"][indices]).sum(-2)
