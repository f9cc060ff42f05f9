"""Is every number finite?"""

import torch
from torch import Tensor

_CHUNK = 1 << 20  # numbers looked at once: nothing the size of the tensor is allocated


def all_finite(numbers: Tensor) -> bool:
    """Whether `numbers` holds no NaN and no infinity."""
    return all(_chunk_is_finite(chunk) for chunk in torch.split(numbers.reshape(-1), _CHUNK))


def _chunk_is_finite(numbers: Tensor) -> bool:
    # a sum is many times faster than isfinite, and finite only if all are; a huge sum is looked at again
    return bool(numbers.sum(dtype=torch.float32).isfinite()) or bool(numbers.isfinite().all())
