"""Places in a matrix that HF PEFT draws from a seed, and does not save."""

import threading
from functools import lru_cache

import torch
from torch import Tensor

_ONE_AT_A_TIME = threading.Lock()  # the workers of a merge begin with weights of one shape


def drawn_places(seed: int, shape: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """Rows (count,) and columns (count,) of the first places of a random order of all numbers of a matrix.

    Weights of one shape have the same places, and drawing them takes longer than all else: the last ones are kept,
    but for those of a trace, which are no numbers.
    Source: HF PEFT's `peft/tuners/fourierft/layer.py`, `peft/tuners/waveft/layer.py`.
    """
    if torch.compiler.is_exporting():
        return _draw(seed, shape, count)
    with _ONE_AT_A_TIME:
        return _drawn(seed, shape, count)


def _draw(seed: int, shape: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(shape[0] * shape[1], generator=generator)[:count]
    return places // shape[1], places % shape[1]


_drawn = lru_cache(maxsize=16)(_draw)
