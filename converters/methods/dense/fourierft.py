"""FourierFT: `W = W0 + s · Re(ifft2(F))`, F with n trained numbers at places that are drawn from a seed.

Where the places are depends on the shape of the weight, on `random_loc_seed`, and on `torch.randperm`. The spectrum
is that of the (out, in) weight, also where it is stored as (in, out). Source: arXiv 2405.03003; HF PEFT's
`peft/tuners/fourierft/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import BaseMismatchError
from converters.methods.peft_form import PeftForm, Shapes, integer, number
from converters.methods.shapes import Axes
from converters.methods.stored import StoredMethod
from converters.methods.weight_delta import Reads


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    return {"scaling": number(config, "scaling"), "seed": integer(config, "random_loc_seed", low=0)}


@dataclass(frozen=True, eq=False)
class FourierFt(StoredMethod):
    """θ of one module: the spectrum (n,)."""

    name = "fourierft"
    formula = "`W = W0 + s·Re(ifft2(F))` (FourierFT, [arXiv 2405.03003](https://arxiv.org/abs/2405.03003))"
    remark = "Where the numbers lie is drawn by `torch.randperm`"
    axes: ClassVar[Mapping[str, Axes]] = {"spectrum": ("n",)}
    peft = PeftForm(
        peft_type="FOURIERFT",
        parameters={"fourierft_spectrum": "spectrum"},
        mark="fourierft_",
        fields=("scaling", "random_loc_seed"),
        inert=("n_frequency", "n_frequency_pattern"),
        settings=_settings,
    )

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`: its shape."""
        return Reads.WHOLE

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "is given in the frequency domain (FourierFT), so it is not of low rank"

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`."""
        super().check_fits(shape, name)
        if shape[0] * shape[1] < self.sizes["n"]:
            raise BaseMismatchError(f"{name}: the weight has shape {shape}, fewer numbers than the spectrum's n")

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        spectrum = self.theta["spectrum"]
        generator = torch.Generator().manual_seed(self.given["seed"])
        places = torch.randperm(w0.numel(), generator=generator)[: len(spectrum)].to(w0.device)
        frequencies = torch.zeros(w0.numel(), dtype=spectrum.dtype, device=w0.device)
        frequencies[places] = spectrum
        delta: Tensor = torch.fft.ifft2(frequencies.view(w0.shape)).real
        return delta * float(self.given["scaling"] * self.weight)
