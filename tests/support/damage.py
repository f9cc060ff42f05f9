"""Changes of an adapter's weights, for `edit_weights`."""

from collections.abc import Callable

import torch


def without(mark: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: {key: tensor for key, tensor in weights.items() if mark not in key}


def changed(mark: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: {
        key: change(tensor).contiguous() if mark in key else tensor for key, tensor in weights.items()
    }
