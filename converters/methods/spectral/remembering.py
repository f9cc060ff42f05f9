"""What costs most, and is asked for twice: a weight is decomposed to evaluate it, and soon after to verify it."""

import hashlib
import threading
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_MOST = 2  # weights: as many as are evaluated at once on a CPU of two cores, and what they need stays bounded

_P = ParamSpec("_P")
_T = TypeVar("_T")


def remembering(find: Callable[Concatenate[Tensor, _P], _T]) -> Callable[Concatenate[Tensor, _P], _T]:
    """A function that keeps what it has found for the weights that it was called with last.

    Args:
        find: a function of a weight and of what can be hashed, or is a tensor, too. Nobody may change its result.

    A weight is known again by the digest of its numbers; those on a GPU are not kept.
    """
    latest: dict[Hashable, _T] = {}
    lock = threading.Lock()

    @wraps(find)
    def remembered(weight: Tensor, /, *args: _P.args, **named: _P.kwargs) -> _T:
        """What was found for this weight, or is found now."""
        if weight.device.type != "cpu":
            return find(weight, *args, **named)
        given = [weight, *args, *(part for item in sorted(named.items()) for part in item)]
        key = tuple(_digest(part) if isinstance(part, Tensor) else part for part in given)
        with lock:
            if key in latest:
                return latest[key]
        found = find(weight, *args, **named)
        with lock:
            latest[key] = found
            while len(latest) > _MOST:
                del latest[next(iter(latest))]
        return found

    return remembered


def _digest(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    digest = hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return tensor.dtype, tuple(tensor.shape), digest.digest()
