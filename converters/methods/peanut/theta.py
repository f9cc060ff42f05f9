"""θ of one PEANuT module, and the small network that it makes."""

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from converters.errors import ThetaError
from converters.methods.factors import Factors
from converters.methods.peanut.activations import NEGATIVE_SLOPE, find_activation, known_activations
from converters.methods.peanut.network import check_shapes, hidden_layers


class Orientation(str, Enum):
    """Which vectors of W0 the tweaker reads."""

    ROWS = "rows"
    COLUMNS = "columns"
    FREE = "free"  # none: LoRA


@dataclass(frozen=True, eq=False)
class Theta:
    """Layers and settings. `d` is `out` in the columns orientation and `in` in the rows orientation.

    Attributes:
        orientation: see `converters/methods/peanut/tweaker.py`.
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
            tuple(self.a.shape),
            tuple(self.b.shape),
            [tuple(e.shape) for e in self.encoders],
            [tuple(d.shape) for d in self.decoders],
            is_free=self.orientation is Orientation.FREE,
            residual=self.residual,
        )

    @property
    def r(self) -> int:
        """The hidden size of f, and the rank of its exact factors."""
        return self.a.shape[0]

    @property
    def depth(self) -> int:
        """PEFT's depth: pairs of hidden r × r layers. The paper counts 2 * depth + 2."""
        return len(self.encoders)

    def hidden(self, projected: Tensor) -> Tensor:
        """h from the projection `A W0` (r, n) or `(W0 Aᵀ)ᵀ` (r, n): features lie on dimension 0."""
        act = find_activation(self.act_fn, self.negative_slope)
        return hidden_layers(projected, act, self.encoders, self.decoders, self.residual)

    def as_factors(self, up: Tensor, down: Tensor) -> Factors:
        """The `Factors` from `up` (out, r) without s and `down` (r, in)."""
        if self.output_act_fn is None:
            return Factors(up * self.scaling, down)
        return Factors(up, down, self.output_act_fn, self.scaling, self.negative_slope)
