"""The small network in a tweaker: its r × r hidden layers, and the check that its shapes fit each other."""

from collections.abc import Sequence

from torch import Tensor

from converters.errors import ThetaError
from converters.methods.peanut.activations import Activation


def hidden_layers(
    projected: Tensor, act: Activation, encoders: Sequence[Tensor], decoders: Sequence[Tensor], residual: bool
) -> Tensor:
    """The last hidden layer h (r, n) from the first projection (r, n); features lie on dimension 0.

    With `residual`, decoder i adds the input of the encoder that it mirrors (arXiv 2410.01870, Fig. 2).
    """
    h = act(projected)
    inputs = []
    for encoder in encoders:
        inputs.append(h)
        h = act(encoder @ h)
    for decoder in decoders:
        h = act(decoder @ h)
        if residual:
            h = h + inputs.pop()
    return h


def check_shapes(
    a: tuple[int, ...],
    b: tuple[int, ...],
    encoders: Sequence[tuple[int, ...]],
    decoders: Sequence[tuple[int, ...]],
    *,
    is_free: bool,
    residual: bool,
) -> None:
    """Raise `ThetaError` unless the layers of one tweaker fit each other; `is_free` is the free orientation."""
    pair = len(a) == 2 and len(b) == 2 and a[0] == b[1] > 0
    if not pair or (not is_free and a[1] != b[0]):
        wanted = "(r, in) and (out, r)" if is_free else "(r, d) and (d, r)"
        raise ThetaError(f"A has shape {a} and B {b}; expected {wanted}")
    if residual and len(encoders) != len(decoders):
        raise ThetaError(f"{len(encoders)} encoders but {len(decoders)} decoders; mirrored residuals need as many")
    if is_free and (encoders or decoders):
        raise ThetaError("hidden layers, but the free orientation (LoRA) has none")
    for layer in (*encoders, *decoders):
        if layer != (a[0], a[0]):
            cause = "; A and B look swapped" if layer == (a[1], a[1]) else ""
            raise ThetaError(f"a hidden layer has shape {layer}; expected {(a[0], a[0])}{cause}")
