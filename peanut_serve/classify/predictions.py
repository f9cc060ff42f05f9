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
    """Raise `VerificationError` for an output that is not finite, or, where there are labels, of another number."""
    if not np.isfinite(logits).all():
        raise VerificationError(f"{task}: the graph answers NaN or infinity; was its adapter left out of the run?")
    if labels and logits.shape[-1] != len(labels):
        raise VerificationError(
            f"{task}: the graph gives {logits.shape[-1]} logits, the config has {len(labels)} labels"
        )


def predictions(
    logits: NDArray[np.float32], labels: Sequence[str], top_k: int, problem_type: str | None = None
) -> list[Prediction]:
    """The best labels for logits (labels,), best first; what a score is, `problem_type` says as in transformers."""
    wide = logits.astype(np.float64)
    if len(labels) == 1 or problem_type == "regression":
        scores = wide
    elif problem_type == "multi_label_classification":
        scores = np.exp(-np.logaddexp(0, -wide))
    else:
        exponentials = np.exp(wide - wide.max())
        scores = exponentials / exponentials.sum()
    return [Prediction(labels[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:top_k]]
