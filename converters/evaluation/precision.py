"""In which precision deltas are evaluated, and how far from its definition that may leave a number."""

from collections.abc import Iterable

import torch

from converters.files.header import FLOAT_DTYPES
from converters.methods.weight_delta import WeightDelta

# W0 and f often cancel. In float32 such a sum can be off by many units in its last place once it is rounded to
# bfloat16; float64 makes the rounding right, whatever the blocks
EVALUATION_DTYPE = torch.float64

# of an evaluation, relative to the magnitudes that it adds up
ROUNDOFF = 2.0**-44
_ROUNDOFF_OF_FLOAT32 = 2.0**-21


def dtype_of(delta: WeightDelta, output: str) -> torch.dtype:
    """What a delta is evaluated in, for a tensor of the dtype `output`, as safetensors spells it.

    It is added to W0 in float64 in any case, and the sum is rounded once.
    """
    # a delta of full rank costs more than all else, and float32 is far more precise than 16 bits
    in_float32 = delta.is_costly and FLOAT_DTYPES[output].itemsize == 2
    return torch.float32 if in_float32 else EVALUATION_DTYPE


def roundoff_of(deltas: Iterable[WeightDelta], output: str) -> float:
    """How far their sum may be off before it is rounded, relative to the magnitudes that it was added up from."""
    narrow = any(dtype_of(delta, output) is torch.float32 for delta in deltas)
    return _ROUNDOFF_OF_FLOAT32 if narrow else ROUNDOFF
