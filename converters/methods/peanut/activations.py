"""The activations σ of a tweaker, under the names of `transformers.activations.ACT2FN`.

They are written out here because importing transformers' table costs seconds. The test suite holds every
entry of `ACTIVATIONS` against `ACT2FN`. What only the paper has is in `PAPER_ACTIVATIONS`.
"""

import math
from collections.abc import Callable
from functools import partial

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


def _sin_2pi(x: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * x)


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

# arXiv 2410.01870, §3.4 and Fig. 4: σ_p(x) = sin(2πx)
PAPER_ACTIVATIONS: dict[str, Activation] = {"sin_2pi": _sin_2pi}

# of torch's and transformers' leaky_relu
NEGATIVE_SLOPE = 0.01


def known_activations() -> list[str]:
    """The names `find_activation` knows."""
    return sorted({**ACTIVATIONS, **PAPER_ACTIVATIONS})


def find_activation(name: str, negative_slope: float = NEGATIVE_SLOPE) -> Activation:
    """The activation called `name`; `negative_slope` is that of `leaky_relu`. Raises `KeyError` if unknown."""
    if name == "leaky_relu":
        return partial(functional.leaky_relu, negative_slope=negative_slope)
    return {**ACTIVATIONS, **PAPER_ACTIVATIONS}[name]
