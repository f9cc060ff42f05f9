"""The delta weight of one module and its exact factors, for callers with a weight in memory."""

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.files.blocks import block_rows
from converters.methods.base import Method
from converters.methods.factors import Factors
from converters.methods.peanut.tweaker import Tweaker


def factors(w0: Tensor, method: Method, dtype: torch.dtype | None = None) -> Factors:
    """The exact factors of a delta weight.

    Args:
        w0: the original weight (out, in), any floating dtype. It is read block by block, never copied whole.
        method: θ of the module.
        dtype: what to evaluate in; float32 by default, float64 if `w0` or θ is float64.

    Returns:
        `Factors` in `dtype`, on the device of `w0`.

    Raises:
        BaseMismatchError: `w0` does not have the shape θ was trained for.
        ConversionError: the method has no factors.
    """
    method.check_fits(tuple(w0.shape))
    if method.rank is None and not isinstance(method, Tweaker):  # with an output activation they are not exact alone
        raise ConversionError(f"the update {method.full_rank_reason}: it has no factors; use delta_weight")
    update = method.update((w0.shape[0], w0.shape[1]), _dtype_of(w0, method, dtype), w0.device)
    return update.factors(torch.split(w0, block_rows(w0.shape[1])))


def delta_weight(w0: Tensor, method: Method, dtype: torch.dtype | None = None) -> Tensor:
    """`g(W0; θ) − W0`, scale included, (out, in); arguments as for `factors`.

    Raises:
        BaseMismatchError: `w0` does not have the shape θ was trained for.
    """
    method.check_fits(tuple(w0.shape))
    wanted = _dtype_of(w0, method, dtype)
    return method.to(w0.device, wanted).delta(w0.to(wanted))


def _dtype_of(w0: Tensor, method: Method, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    given = {w0.dtype, *(part.dtype for part in method.parts.values())}
    return torch.float64 if torch.float64 in given else torch.float32
