"""The tweaker f(W0; θ) of one module: what it is made of, and its hidden layers. `evaluation.py` evaluates it.

PEANuT (arXiv 2410.01870, §3.3) adapts a frozen weight by a small network that reads it, `W = W0 + f(W0; θ)`.
The last step of f is linear, so the update has an exact factorisation `f(W0; θ) = up @ down` of rank ≤ r,
at any depth and for any elementwise activation σ. With h the last hidden layer:

    columns   f = s · B σ(A W0)        A (r, out), B (out, r), h (r, in)    up = s · B      down = h
    rows      f = s · σ(W0 Aᵀ) Bᵀ      A (r, in),  B (in, r),  h (out, r)   up = s · h      down = Bᵀ
    free      f = s · σ(B) A           A (r, in),  B (out, r)               up = s · σ(B)   down = A

`columns` is what HF PEFT trains (`peft/tuners/peanut/layer.py`); `rows` is the paper's equation; `free` does
not read W0: with σ the identity it is LoRA, else the paper's nonlinear LoRA (§5.3). Deeper tweakers put r × r
layers between σ and B, usually with mirrored residuals (Fig. 2). Only a variant that ends in an activation
(`output_act_fn`) has no factors of rank r; it is evaluated from `up`, `down` and that activation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from converters.errors import BaseMismatchError, ThetaError
from converters.methods.activations import NEGATIVE_SLOPE, find_activation, known_activations

# (out, in) of the weight θ was made for; None where θ does not tell
WeightShape = tuple[int | None, int | None]


class Orientation(str, Enum):
    """Which vectors of W0 the tweaker reads."""

    ROWS = "rows"
    COLUMNS = "columns"
    FREE = "free"  # none: LoRA

    def weight_shape(self, a: Sequence[int], b: Sequence[int]) -> WeightShape:
        """(out, in) of the weights that θ with A of shape `a` and B of shape `b` was made for."""
        if self is Orientation.FREE:
            return b[0], a[1]
        return (a[1], None) if self is Orientation.COLUMNS else (None, a[1])


@dataclass(frozen=True, eq=False)
class Tweaker:
    """θ of one module. `d` is `out` in the columns orientation and `in` in the rows orientation.

    Attributes:
        orientation: see the module's docstring.
        a, b: the first and the last layer: (r, d) and (d, r); (r, in) and (out, r) in the free orientation.
        encoders, decoders: hidden layers, each (r, r), applied in this order.
        act_fn: σ, applied after every layer but B; one of `known_activations()`.
        scaling: s.
        residual: the output of decoder i has the input of the encoder it mirrors added.
        output_act_fn: an activation on the output of f, before s; the update has no factors then.
        negative_slope: of `leaky_relu`.

    Raises `ThetaError` when the shapes do not fit each other or an activation is unknown.
    """

    orientation: Orientation
    a: Tensor
    b: Tensor
    encoders: tuple[Tensor, ...] = ()
    decoders: tuple[Tensor, ...] = ()
    act_fn: str = "relu"
    scaling: float = 1.0
    residual: bool = True
    output_act_fn: str | None = None
    negative_slope: float = NEGATIVE_SLOPE

    def __post_init__(self) -> None:
        for name in (self.act_fn, self.output_act_fn):
            if name is not None and name not in known_activations():
                raise ThetaError(f"unknown act_fn '{name}'; known are {', '.join(known_activations())}")
        check_shapes(
            self.orientation,
            tuple(self.a.shape),
            tuple(self.b.shape),
            [tuple(e.shape) for e in self.encoders],
            [tuple(d.shape) for d in self.decoders],
            self.residual,
        )

    @property
    def r(self) -> int:
        """The rank: hidden size of f, and the rank of its exact factors."""
        return self.a.shape[0]

    @property
    def depth(self) -> int:
        """PEFT's depth: pairs of hidden r × r layers. The paper counts 2 * depth + 2."""
        return len(self.encoders)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Tweaker":
        """The same tweaker with its tensors on `device` in `dtype`."""
        return replace(
            self,
            a=self.a.to(device, dtype),
            b=self.b.to(device, dtype),
            encoders=tuple(e.to(device, dtype) for e in self.encoders),
            decoders=tuple(d.to(device, dtype) for d in self.decoders),
        )

    def transposed(self) -> "Tweaker":
        """The tweaker g with `g(W0ᵀ) = f(W0)ᵀ`, for weights that are stored as (in, out).

        Raises `ThetaError` for nonlinear LoRA, where σ would have to move to the other factor.
        """
        if self.orientation is Orientation.FREE:
            if self.act_fn != "linear":
                raise ThetaError("nonlinear LoRA is not defined for weights that are stored transposed (Conv1D)")
            return replace(self, a=self.b.T, b=self.a.T)
        rows = self.orientation is Orientation.ROWS
        return replace(self, orientation=Orientation.COLUMNS if rows else Orientation.ROWS)

    def hidden(self, projected: Tensor) -> Tensor:
        """h from the projection `A W0` (r, n) or `(W0 Aᵀ)ᵀ` (r, n): features lie on dimension 0."""
        act = find_activation(self.act_fn, self.negative_slope)
        h = act(projected)
        inputs = []
        for encoder in self.encoders:
            inputs.append(h)
            h = act(encoder @ h)
        for decoder in self.decoders:
            h = act(decoder @ h)
            if self.residual:
                h = h + inputs.pop()
        return h


def check_shapes(
    orientation: Orientation,
    a: tuple[int, ...],
    b: tuple[int, ...],
    encoders: Sequence[tuple[int, ...]],
    decoders: Sequence[tuple[int, ...]],
    residual: bool,
) -> None:
    """Raise `ThetaError` unless the layers of one tweaker fit each other."""
    pair = len(a) == 2 and len(b) == 2 and a[0] == b[1] > 0
    if not pair or (orientation is not Orientation.FREE and a[1] != b[0]):
        wanted = "(r, in) and (out, r)" if orientation is Orientation.FREE else "(r, d) and (d, r)"
        raise ThetaError(f"A has shape {a} and B {b}; wanted {wanted}")
    if residual and len(encoders) != len(decoders):
        raise ThetaError(f"{len(encoders)} encoders but {len(decoders)} decoders; mirrored residuals need as many")
    if orientation is Orientation.FREE and (encoders or decoders):
        raise ThetaError("hidden layers, but the free orientation (LoRA) has none")
    for layer in (*encoders, *decoders):
        if layer != (a[0], a[0]):
            cause = "; A and B look swapped" if layer == (a[1], a[1]) else ""
            raise ThetaError(f"a hidden layer has shape {layer}; wanted {(a[0], a[0])}{cause}")


def check_fits(trained: WeightShape, shape: tuple[int, ...], r: int, name: str = "w0") -> None:
    """Raise `BaseMismatchError` unless θ that was made for `trained` (out, in) fits a weight of `shape`."""
    if len(shape) == 2 and all(want in (None, got) for want, got in zip(trained, shape, strict=True)):
        return
    found = " x ".join(f"{axis} = {size}" for axis, size in zip(("out", "in"), trained, strict=True) if size)
    swapped = len(shape) == 2 and r in shape and any(size is not None and size < r for size in trained)
    raise BaseMismatchError(
        f"{name}: the weight has shape {tuple(shape)}, θ was trained for {found} (r = {r}); "
        + ("A and B look swapped" if swapped else "this is another base, or another model size")
    )
