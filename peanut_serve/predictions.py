"""From logits to labels with scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.errors import VerificationError


@dataclass(frozen=True)
class Prediction:
    """A label, and its probability; of a head with one label, the number it predicts."""

    label: str
    score: float


def check_logits(logits: NDArray[np.float32], labels: Sequence[str], task: str) -> None:
    """Raise `VerificationError` for logits that are NaN, or of another number of labels."""
    if not np.isfinite(logits).all():
        raise VerificationError(f"{task}: the graph answers NaN or infinity; was its adapter left out of the run?")
    if logits.shape[-1] != len(labels):
        raise VerificationError(
            f"{task}: the graph gives {logits.shape[-1]} logits, the config has {len(labels)} labels"
        )


def predictions(
    logits: NDArray[np.float32], labels: Sequence[str], top_k: int, multi_label: bool = False
) -> list[Prediction]:
    """The best labels for logits (labels,), best first; with `multi_label` each has a probability of its own."""
    if len(labels) == 1:
        return [Prediction(labels[0], float(logits[0]))]
    exponentials = np.exp(logits.astype(np.float64) - (0 if multi_label else logits.max()))
    scores = exponentials / ((1 + exponentials) if multi_label else exponentials.sum())
    return [Prediction(labels[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:top_k]]
