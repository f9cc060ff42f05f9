"""KaSA: `W = W0 − W0r + s · B diag(d) A`: the r smallest singular parts of W0 are dropped, and a LoRA learns anew.

HF PEFT drops them from the base weight when it loads the adapter, in float32. What is dropped does not depend on the
signs and the order that a decomposition happens to give, as long as the singular values beside the cut differ.
Source: arXiv 2412.06071; HF PEFT's `peft/tuners/lora/variants.py` (`KasaLinearVariant`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import AdapterConfigError, BaseMismatchError
from converters.methods.peft_form import PeftForm, Shapes
from converters.methods.shapes import Axes
from converters.methods.spectral.decomposed import Decomposed, check_cut, left_axes


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    given = config.get("kasa_config") or {}
    if not isinstance(given, dict) or not set(given) <= {"beta", "gamma"}:  # both are of the training
        raise AdapterConfigError(f"kasa_config = {given!r}; expected an object of beta and gamma")
    return {}


@dataclass(frozen=True, eq=False)
class Kasa(Decomposed):
    """θ of one module: A (r, in), B (out, r) and d (r,)."""

    name = "kasa"
    formula = "`W = W0 − W0r + s·B·diag(d)·A` (KaSA, [arXiv 2412.06071](https://arxiv.org/abs/2412.06071))"
    lora_rank = "2·r"
    remark = "W0r, the r smallest singular parts of W0, are found in float64"
    axes: ClassVar[Mapping[str, Axes]] = {"A": ("r", "in"), "B": ("out", "r"), "diag": ("r",)}
    peft = PeftForm(
        peft_type="LORA",
        flag="kasa_config",
        parameters={"lora_A": "A", "lora_B": "B", "lora_diag": "diag"},
        mark="lora_",
        settings=_settings,
    )

    @property
    def rank(self) -> int:
        """See `WeightDelta.rank`."""
        return 2 * self.sizes["r"]

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`."""
        super().check_fits(shape, name)
        if min(shape) <= self.sizes["r"]:
            raise BaseMismatchError(
                f"{name}: KaSA drops r = {self.sizes['r']} singular parts of {min(shape)}, so all"
            )

    def up_and_down(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decomposed.up_and_down`: what is trained, and what is dropped with the opposite sign."""
        is_wide = w0.shape[0] <= w0.shape[1]
        axes, values = left_axes(w0 if is_wide else w0.T)
        kept = len(values) - self.sizes["r"]
        check_cut(values, kept, "what KaSA drops of it")
        axes = axes[:, kept:]
        dropped = (axes, axes.T @ w0) if is_wide else (w0 @ axes, axes.T)
        up = self.theta["B"] * (self.theta["diag"] * self.given["scaling"])
        return torch.cat([up, -dropped[0]], dim=1), torch.cat([self.theta["A"], dropped[1]])
