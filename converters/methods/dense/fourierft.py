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
from converters.methods.update import Update
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
        """See `WeightDelta.reads`."""
        return Reads.SHAPE

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
        known, numbers = self.half_spectrum((w0.shape[0], w0.shape[1]))
        spectrum = numbers.new_zeros(w0.shape[0], w0.shape[1] // 2 + 1).index_copy_(1, known, numbers)
        delta: Tensor = torch.fft.irfft2(spectrum, s=w0.shape)
        return delta * float(self.given["scaling"] * self.weight)

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: of a few rows, each number's wave down the rows is evaluated by itself."""
        if len(rows) == w0.shape[0]:
            return super().delta_at(w0, rows, columns)
        u, v = self._places(w0)
        numbers = self.theta["spectrum"] * float(self.given["scaling"] * self.weight / w0.numel())
        turns = 2 * torch.pi / w0.shape[0] * (rows[:, None] * u % w0.shape[0]).to(numbers)  # (n, waves)
        along = torch.complex(turns.cos() * numbers, turns.sin() * numbers)
        waves = along.new_zeros(len(rows), w0.shape[1]).index_add_(1, v, along)
        found = torch.fft.ifft(waves, norm="forward").real[:, columns]
        return found, numbers.abs().sum().expand_as(found)

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Update:
        """See `WeightDelta.update`."""
        return WavesUpdate(self.with_parts(self.parts_on(device, dtype)), shape, dtype, device)

    def half_spectrum(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The columns of F that are not zero (k,), as far as `irfft2` reads F, and F in these columns (out, k).

        The real part is that of a spectrum with the mirror image of each number.
        """
        rows, columns = drawn_places(self.given["seed"], shape, self.sizes["n"])
        half = self.theta["spectrum"] / 2
        u = torch.cat([rows, -rows % shape[0]]).to(half.device)
        v = torch.cat([columns, -columns % shape[1]]).to(half.device)
        inside = v <= shape[1] // 2
        known, which = torch.unique(v[inside], return_inverse=True)
        numbers = half.new_zeros(shape[0], len(known))
        numbers.index_put_((u[inside], which), half.repeat(2)[inside], accumulate=True)
        return known, numbers

    def _places(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of the numbers of the spectrum, in a matrix of the shape of `w0`."""
        rows, columns = drawn_places(self.given["seed"], (w0.shape[0], w0.shape[1]), self.sizes["n"])
        return rows.to(w0.device), columns.to(w0.device)


class WavesUpdate(Update):
    """F is transformed down its columns once, and then along the rows of each block as it passes by."""

    def __init__(self, theta: FourierFt, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._scale = float(theta.given["scaling"] * theta.weight)
        self._columns, numbers = theta.half_spectrum(shape)
        self._down: Tensor = torch.fft.ifft(numbers, dim=0)  # (out, k)

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Rows of the delta."""
        count, width = w0.shape
        spectrum = self._down.new_zeros(count, width // 2 + 1)
        spectrum.index_copy_(1, self._columns, self._down[start : start + count])
        delta: Tensor = torch.fft.irfft(spectrum, n=width)
        return delta.mul_(self._scale)
