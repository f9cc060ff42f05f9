"""FRoD: `W = U (S + diag(λ)) Vᵀ`, S sparse and λ trained; V is shared by all modules of a category, and saved.

U is not saved: its columns are those of `W0 V⁻ᵀ`, of length 1. A category is told by the end of a module's name.
Source: https://doi.org/10.1609/aaai.v40i31.39813; HF PEFT's `peft/tuners/frod/layer.py`, `model.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import ThetaError
from converters.methods.peft_form import PeftForm
from converters.methods.shapes import Axes
from converters.methods.stored import StoredMethod, check_indices
from converters.methods.weight_delta import Reads

_ZERO = 1e-12  # a column that is not longer stays zero


def _categories(
    config: Mapping[str, Any], modules: Sequence[str], read: Callable[[str, str], Tensor]
) -> dict[str, str]:
    """Module -> its category (`_category_from_key` in `peft/tuners/frod/model.py`)."""
    return {module: _category(module.split(".")) for module in modules}


def _category(names: list[str]) -> str:
    """The last two parts of a module's name, or the last one after a number."""
    if len(names) == 1 or names[-2].isdigit():
        return names[-1]
    return "attention_output" if names[-3:] == ["attention", "output", "dense"] else "_".join(names[-2:])


@dataclass(frozen=True, eq=False)
class Frod(StoredMethod):
    """θ of one module: λ (in,) and the numbers of S (n,); V (in, in), places (2, n) and size of S of its category."""

    name = "frod"
    formula = "`W = U·(S + diag(λ))·Vᵀ`, U from W0 and V ([FRoD](https://doi.org/10.1609/aaai.v40i31.39813))"
    remark = (
        "Needs `save_projection=True`, PEFT's default. In float64; PEFT rounds U to the dtype of the base, which in "
        "bfloat16 is a difference of about 0.3 % of W0"
    )
    axes: ClassVar[Mapping[str, Axes]] = {
        "lambda_l": ("in",),
        "lambda_s": ("n",),
        "V": ("in", "in"),
        "indices": (2, "n"),
        "size": (2,),
    }
    may_be_empty = "n"
    integers = frozenset({"indices", "size"})
    peft = PeftForm(
        peft_type="FROD",
        parameters={"frod_lambda_l": "lambda_l", "frod_lambda_s_values": "lambda_s"},
        grouped={"frod_V": "V", "frod_s_indices": "indices", "frod_s_size": "size"},
        groups=_categories,
        missing="the projections were not saved (save_projection is false), and the decomposition that gives them "
        "depends on the machine; PEFT cannot save them afterwards; train with save_projection=True, its default",
        mark="frod_",
        inert=(
            "projection_prng_key", "save_projection", "frod_dropout", "sparse_rate", "regularization_alpha",
            "progressbar", "runtime_offload_base_weight",
        ),
    )  # fmt: skip

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`: the lengths of U's columns."""
        return Reads.WHOLE

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "is a sum in another basis (FRoD), so it is not of low rank"

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        v, length = self.theta["V"], self.sizes["in"]
        rows, columns = self.theta["indices"].long()
        check_indices("frod_s_indices", rows, length)
        check_indices("frod_s_indices", columns, length)
        if self.theta["size"].tolist() != [length, length]:
            raise ThetaError(f"frod_s_size is {self.theta['size'].tolist()}; expected {[length, length]}")
        middle = torch.diag(self.theta["lambda_l"])
        middle.index_put_((rows, columns), self.theta["lambda_s"], accumulate=True)
        try:
            u = torch.linalg.solve(v, w0.T).T
        except RuntimeError:
            raise ThetaError("frod_V is singular, so that U is not determined; the adapter is damaged") from None
        lengths = torch.linalg.vector_norm(u, dim=0)
        u = torch.where(lengths > _ZERO, u / lengths, 0)
        return (u @ middle @ v.T - w0) * self.weight
