"""Tweakers of every kind with their formulas written out in float64."""

import math

import torch
from support.tiny_models import tiny_llama
from torch import Tensor

from converters import Orientation, Tweaker

MODULE = "model.layers.1.self_attn.k_proj"  # (16, 32)


def sin(x: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * x)


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def theta(*shapes: tuple[int, int]) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(shape) / 3 for shape in shapes]


def variants() -> dict[str, tuple[Tweaker, Tensor]]:
    """Name -> (tweaker, its delta weight written out in float64, for W0 of k_proj)."""
    w = tiny_weights()[f"{MODULE}.weight"].double()
    rows, columns, free = Orientation.ROWS, Orientation.COLUMNS, Orientation.FREE
    found: dict[str, tuple[Tweaker, Tensor]] = {}

    a, b = theta((4, 32), (32, 4))
    da, db = a.double(), b.double()
    found["sine"] = Tweaker(rows, a, b, act_fn="sin_2pi", scaling=0.5), 0.5 * sin(w @ da.T) @ db.T
    found["leaky relu"] = (
        Tweaker(rows, a, b, act_fn="leaky_relu", negative_slope=0.2),
        leaky(w @ da.T) @ db.T,
    )
    found["output activation"] = (
        Tweaker(rows, a, b, act_fn="relu", output_act_fn="tanh", scaling=3.0),
        3.0 * torch.tanh(relu(w @ da.T) @ db.T),
    )
    found["multiplicative"] = Tweaker(rows, a, b, act_fn="linear"), w @ da.T @ db.T

    a, b, e0, e1, d0, d1 = theta((4, 16), (16, 4), (4, 4), (4, 4), (4, 4), (4, 4))
    da, db, g0, g1, h0, h1 = (t.double() for t in (a, b, e0, e1, d0, d1))
    first = relu(da @ w)
    second = relu(g0 @ first)
    third = relu(g1 @ second)
    deep = relu(h1 @ (relu(h0 @ third) + second)) + first
    found["deep"] = Tweaker(columns, a, b, (e0, e1), (d0, d1), scaling=2.0), 2.0 * db @ deep
    plain = relu(h1 @ relu(h0 @ third))
    found["deep without residuals"] = Tweaker(columns, a, b, (e0, e1), (d0, d1), residual=False), db @ plain
    found["odd depth without residuals"] = Tweaker(columns, a, b, (e0,), residual=False), db @ second
    found["sine on the output, columns"] = (
        Tweaker(columns, a, b, (e0,), (d0,), output_act_fn="sin_2pi", scaling=0.1),
        0.1 * sin(db @ (relu(h0 @ second) + first)),
    )

    a, b = theta((4, 32), (16, 4))
    found["lora"] = Tweaker(free, a, b, act_fn="linear", scaling=0.5), 0.5 * b.double() @ a.double()
    found["nonlinear lora"] = Tweaker(free, a, b, act_fn="silu"), torch.nn.functional.silu(b.double()) @ a.double()
    found["nonlinear lora, output"] = (
        Tweaker(free, a, b, act_fn="relu", output_act_fn="leaky_relu", negative_slope=0.2),
        leaky(relu(b.double()) @ a.double()),
    )
    return found


def tiny_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.detach() for name, tensor in tiny_llama().state_dict().items()}
