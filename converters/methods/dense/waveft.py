"""WaveFT: `W = W0 + s · IDWT(F)`, F with n trained wavelet coefficients at places that are drawn from a seed.

F is padded so that one step of the inverse discrete wavelet transform in two dimensions gives the shape of the
weight, and its four quarters are the bands. The transform is linear and separable: along the rows, then along the
columns. Without `use_idwt` F itself is added. Where the places are depends on the shape of the weight, on
`random_loc_seed`, and on `torch.randperm`; they are those of the (out, in) weight, also where it is stored as
(in, out). Source: arXiv 2505.12532; HF PEFT's `peft/tuners/waveft/layer.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import AdapterConfigError, BaseMismatchError, MissingDependencyError
from converters.methods.dense.drawn_places import drawn_places
from converters.methods.dense.sparse import Sparse
from converters.methods.peft_form import PeftForm, Shapes, boolean, integer, number
from converters.methods.shapes import Axes

_HAAR = "db1"


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    wavelet = config["wavelet_family"] if boolean(config, "use_idwt") else None
    if wavelet is not None:
        low_pass(str(wavelet))
    return {
        "scaling": number(config, "scaling"),
        "seed": integer(config, "random_loc_seed", low=0),
        "wavelet": wavelet,
    }


@dataclass(frozen=True, eq=False)
class WaveFt(Sparse):
    """θ of one module: the coefficients (n,)."""

    name = "waveft"
    formula = "`W = W0 + s·IDWT(F)` (WaveFT, [arXiv 2505.12532](https://arxiv.org/abs/2505.12532))"
    remark = "Where the numbers lie is drawn by `torch.randperm`. Wavelets other than `db1` need PEFT (`[peft]`)"
    axes: ClassVar[Mapping[str, Axes]] = {"spectrum": ("n",)}
    peft = PeftForm(
        peft_type="WAVEFT",
        parameters={"waveft_spectrum": "spectrum"},
        mark="waveft_",
        fields=("scaling", "random_loc_seed", "wavelet_family", "use_idwt"),
        inert=("n_frequency", "n_frequency_pattern", "proportional_parameters"),
        settings=_settings,
    )

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "consists of wavelets (WaveFT), so it is not of low rank"

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`."""
        super().check_fits(shape, name)
        if shape[0] * shape[1] < self.sizes["n"]:
            raise BaseMismatchError(f"{name}: the weight has shape {shape}, fewer numbers than the spectrum's n")

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        places, numbers = self.entries((w0.shape[0], w0.shape[1]))
        flat = numbers.new_zeros(w0.numel()).index_put_((places,), numbers, accumulate=True)
        return flat.view(w0.shape) * self.weight

    def entries(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """See `Sparse.entries`: each coefficient contributes to as many rows and columns as a filter has taps."""
        spectrum = self.theta["spectrum"] * float(self.given["scaling"])
        rows, columns = (p.to(spectrum.device) for p in drawn_places(self.given["seed"], shape, len(spectrum)))
        if self.given["wavelet"] is None:
            return rows * shape[1] + columns, spectrum
        return _inverse_dwt(rows, columns, spectrum, low_pass(self.given["wavelet"]), shape)


def _inverse_dwt(
    rows: Tensor, columns: Tensor, numbers: Tensor, low_pass: tuple[float, ...], shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """One step of the inverse transform in two dimensions, of a matrix of few numbers.

    Args:
        rows, columns: where they are (n,) in a matrix of this shape.
        numbers: (n,).
        low_pass: the low-pass filter; the high-pass filter is its mirror image with alternating signs.
        shape: (out, in), also of the result.

    Returns: flat places in the result, and what is added there; places repeat.
    """
    taps = torch.arange(len(low_pass), device=numbers.device)
    low = torch.tensor(low_pass, dtype=numbers.dtype, device=numbers.device)
    filters = torch.stack([low, low.flip(0) * (1 - 2 * (taps % 2))])  # (2, taps)
    row_half, first_row = _spread(rows, shape[0], len(low))
    column_half, first_column = _spread(columns, shape[1], len(low))
    # crosswise: PEFT has the upper right quarter as the vertical detail
    down = filters[column_half] * numbers[:, None]
    along, y = filters[row_half], first_row[:, None] + taps
    places, added = [], []
    for tap in range(len(low)):
        x = (first_column[:, None] + tap).expand_as(y)
        inside = (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
        places.append((y * shape[1] + x)[inside])
        added.append((down * along[:, tap, None])[inside])
    return torch.cat(places), torch.cat(added)


def _spread(places: Tensor, size: int, taps: int) -> tuple[Tensor, Tensor]:
    """Along one axis: the half of the padded matrix that each place is in, and the first place it contributes to.

    The weight lies in the middle of the padded matrix, whose halves are the two bands. Of what the filters give, the
    middle is the result.
    """
    half = math.ceil((size + taps - 2) / 2)
    padded = places + (2 * half - size) // 2
    margin = taps - 2 + (2 * half - (taps - 2) - size) // 2
    return padded // half, 2 * (padded % half) - margin


@lru_cache
def low_pass(wavelet: str) -> tuple[float, ...]:
    """The low-pass reconstruction filter of a wavelet.

    Raises:
        AdapterConfigError: it is none that PEFT can train with.
        MissingDependencyError: it is not Haar's, and PEFT is not installed.
    """
    if wavelet == _HAAR:
        return (math.sqrt(0.5), math.sqrt(0.5))
    try:
        from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
        from peft.tuners.waveft.wavelet import Wavelet
    except ImportError:
        raise MissingDependencyError(
            f"WaveFT with wavelet_family {wavelet!r} takes its filter from PEFT: pip install 'peanut-serve[peft]'"
        ) from None
    try:
        found = tuple(float(number) for number in Wavelet(wavelet).rec_lo)
    except ValueError:  # PEFT's config names more families than it has filters of
        found = ()
    if WAVELET_REDUCTIONS.get(wavelet, (None,))[0] != len(found) - 2:  # so with coif5: PEFT's own forward pass fails
        raise AdapterConfigError(f"wavelet_family = {wavelet!r} is not a wavelet that the installed PEFT can compute")
    return found
