"""The activations σ of a tweaker, under the names of `transformers.activations.ACT2FN`.

They are written out here because importing transformers' table costs seconds. The test suite holds every
entry against `ACT2FN`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_10(x: Tensor) -> Tensor:
    return functional.gelu(x).clip(-10, 10)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def _relu2(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def _sqrtsoftplus(x: Tensor) -> Tensor:
    return functional.softplus(x).sqrt()


def _linear(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Activation] = {
    "gelu": functional.gelu,
    "gelu_10": _gelu_10,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_fast,
    "gelu_new": _gelu_tanh,
    "gelu_python": functional.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": functional.hardswish,
    "laplace": _laplace,
    "leaky_relu": functional.leaky_relu,
    "linear": _linear,
    "mish": functional.mish,
    "quick_gelu": _quick_gelu,
    "relu": functional.relu,
    "relu2": _relu2,
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "sqrtsoftplus": _sqrtsoftplus,
    "swish": functional.silu,
    "tanh": torch.tanh,
}

# Known to transformers, but with parameters of their own that PEFT does not save with the adapter.
WITH_UNSAVED_PARAMETERS = frozenset({"prelu", "xielu"})
