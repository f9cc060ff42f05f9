"""A written graph compared with the merged torch model, on inputs of several sizes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from converters.errors import VerificationError
from converters.inference.session import Arrays
from converters.outputs.onnx.graphs.reference import Reference

# float32 noise of two implementations: relative to the largest output, at least to 1
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """How much a graph differs from torch.

    Attributes:
        examples: number of inputs that were compared.
        batch_sizes: of their batches.
        real: how many of them were real ones.
        largest_difference: of an output from torch's.
        tolerance: the limit for it.
        agreement: share of outputs whose largest entry is the same; for classifiers.
    """

    examples: int
    batch_sizes: tuple[int, ...]
    real: int
    largest_difference: float
    tolerance: float
    agreement: float

    def summary(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def check_parity(
    what: str,
    run: Callable[[Arrays], Sequence[NDArray[np.float32]]],
    reference: Reference,
    changed: Mapping[str, Tensor],
    real: Iterable[Mapping[str, Tensor]] = (),
) -> Parity:
    """Compare a graph with the merged torch model on random inputs, and on real ones where there are any.

    Args:
        what: the name of the graph, for messages.
        run: computes its outputs for inputs by name.
        reference: the base in torch.
        changed: the task's tensors, which replace the base's.
        real: batches of real inputs.

    Raises `VerificationError` when an output differs by more than `TOLERANCE`, or is not finite.
    """
    random, genuine = reference.random_inputs(seed=1), list(real)
    differences, scales, same = [], [1.0], []
    for inputs in (*random, *genuine):
        outputs = run({name: tensor.numpy() for name, tensor in inputs.items()})
        equal = []
        for found, tensor in zip(outputs, reference.run(inputs, changed), strict=True):
            wanted = tensor.numpy()
            if found.shape != wanted.shape:
                raise VerificationError(f"{what}: the output has shape {found.shape}, torch's has {wanted.shape}")
            differences.append(float(np.abs(found - wanted).max()))
            scales.append(float(np.abs(wanted).max()))
            equal.append((found.argmax(-1) == wanted.argmax(-1)).mean())
        same.append(np.mean(equal))
    sizes = [len(next(iter(inputs.values()))) for inputs in (*random, *genuine)]
    tolerance = TOLERANCE * max(scales)
    parity = Parity(
        examples=sum(sizes),
        batch_sizes=tuple(sorted(set(sizes))),
        real=sum(sizes[len(random) :]),
        largest_difference=max(differences),
        tolerance=tolerance,
        agreement=float(np.average(same, weights=sizes)),
    )
    if not parity.largest_difference <= tolerance:  # NaN is not either
        raise VerificationError(
            f"{what}: an output differs from the merged torch model's by {parity.largest_difference:.2e}, at most "
            f"{tolerance:.2e} was expected (top-1 agreement {parity.agreement:.0%}); nothing was written"
        )
    return parity
