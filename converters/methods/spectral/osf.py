"""OSF: `W = W0k + U diag(S) V`: the k largest singular parts of W0 stay, trained ones take the place of the others.

What stays is the best approximation of W0 of rank k, which does not depend on the signs and the order that a
decomposition happens to give, as long as the singular values k and k + 1 differ. Source: arXiv 2504.07097; HF PEFT's
`peft/tuners/osf/layer.py`, `model.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import AdapterConfigError, ThetaError
from converters.methods.peft_form import PeftForm, Shapes, as_number
from converters.methods.shapes import Axes
from converters.methods.spectral.decomposed import Decomposed, check_cut, left_axes


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    least, trained = min(shapes["U"][0], shapes["V"][1]), shapes["S"][0]
    kept = _effective_rank(config, module, least)
    if least - trained != kept:
        raise ThetaError(f"{module}: θ replaces {trained} of {least} singular values, the config keeps {kept}")
    return {}


def _effective_rank(config: Mapping[str, Any], module: str, least: int) -> int:
    """k of one module: a number, or a fraction of the smaller size of the weight (`OSFModel._create_and_replace`)."""
    patterns = config["rank_pattern"] or {}
    if not isinstance(patterns, dict):
        raise AdapterConfigError(f"rank_pattern = {patterns!r}; expected an object")
    try:
        name, value = next(
            (("rank_pattern", rank) for pattern, rank in patterns.items() if re.search(pattern, module)),
            ("effective_rank", config["effective_rank"]),
        )
    except re.error as error:
        raise AdapterConfigError(f"a pattern is not a valid regular expression ({error})") from None
    if value is None:
        return least // 2
    number = as_number(name, value)
    return max(0, min(least, int(least * number) if isinstance(value, float) and 0 < value <= 1 else int(number)))


@dataclass(frozen=True, eq=False)
class Osf(Decomposed):
    """θ of one module: U (out, n), S (n,) and V (n, in)."""

    name = "osf"
    formula = "`W = W0k + U·diag(S)·V`, W0k of rank k (OSF, [arXiv 2504.07097](https://arxiv.org/abs/2504.07097))"
    lora_rank = "2·(min(in, out) − k)"
    remark = (
        "As LoRA where that is smaller than W0. In float64: PEFT rounds parts of W0 to the dtype of the base, "
        "which in bfloat16 is a difference of about 0.1 % of W0"
    )
    axes: ClassVar[Mapping[str, Axes]] = {"U": ("out", "n"), "S": ("n",), "V": ("n", "in")}
    may_be_empty = "n"
    peft = PeftForm(
        peft_type="OSF",
        parameters={f"osf_svd_params.{part}_low": part for part in "USV"},
        mark="osf_",
        fields=("effective_rank", "rank_pattern"),
        settings=_settings,
    )

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        if sizes["n"] > min(sizes["out"], sizes["in"]):
            raise ThetaError(f"S has {sizes['n']} singular values, more than a weight of these sizes: {dict(sizes)}")

    @property
    def rank(self) -> int | None:
        """See `WeightDelta.rank`."""
        rank = 2 * self.sizes["n"]
        return rank if rank < min(self.sizes["out"], self.sizes["in"]) else None

    @property
    def full_rank_reason(self) -> str | None:
        """See `WeightDelta.full_rank_reason`."""
        return (
            None if self.rank is not None else "replaces most of W0's singular parts (OSF), so it is not of low rank"
        )

    def up_and_down(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decomposed.up_and_down`: what is trained, and what it replaces with the opposite sign."""
        k = min(w0.shape) - self.sizes["n"]
        is_wide = w0.shape[0] <= w0.shape[1]
        axes, values = left_axes(w0 if is_wide else w0.T)
        check_cut(values, k, "what OSF keeps of it")
        axes = axes[:, k:]
        replaced = (axes, axes.T @ w0) if is_wide else (w0 @ axes, axes.T)
        up = torch.cat([self.theta["U"] * self.theta["S"], -replaced[0]], dim=1)
        return up, torch.cat([self.theta["V"], replaced[1]])
