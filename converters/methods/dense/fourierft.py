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
from converters.methods.dense.drawn_places import drawn_places
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
        """See `WeightDelta.delta`: the real part is that of a spectrum with the mirror image of each number."""
        rows, columns = self._places(w0)
        half, numbers = self.theta["spectrum"] / 2, w0.new_zeros(w0.shape[0], w0.shape[1] // 2 + 1)
        for u, v in ((rows, columns), (-rows % w0.shape[0], -columns % w0.shape[1])):
            inside = v < numbers.shape[1]
            numbers.index_put_((u[inside], v[inside]), half[inside], accumulate=True)
        delta: Tensor = torch.fft.irfft2(numbers, s=w0.shape)
        return delta * float(self.given["scaling"] * self.weight)

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: a few numbers are added up wave by wave, without a transform."""
        if len(rows) == w0.shape[0]:
            return super().delta_at(w0, rows, columns)
        u, v = self._places(w0)
        down = 2 * torch.pi / w0.shape[0] * (rows[:, None] * u % w0.shape[0]).to(w0)  # (n, waves)
        along = 2 * torch.pi / w0.shape[1] * (v[:, None] * columns % w0.shape[1]).to(w0)  # (waves, m)
        numbers = self.theta["spectrum"] * float(self.given["scaling"] * self.weight / w0.numel())
        pairs = [(down.cos() * numbers, along.cos()), (-down.sin() * numbers, along.sin())]
        found = torch.stack([left @ right for left, right in pairs]).sum(dim=0)
        return found, torch.stack([left.abs() @ right.abs() for left, right in pairs]).sum(dim=0)

    def _places(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of the numbers of the spectrum, in a matrix of the shape of `w0`."""
        rows, columns = drawn_places(self.given["seed"], (w0.shape[0], w0.shape[1]), self.sizes["n"])
        return rows.to(w0.device), columns.to(w0.device)
