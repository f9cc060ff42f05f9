"""Turns logits into labels with scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.errors import VerificationError


@dataclass(frozen=True)
class Prediction:
    """A label and its probability; for a head with one label, the number it predicts."""

    label: str
    score: float


def check_logits(logits: NDArray[np.float32], labels: Sequence[str], task: str) -> None:
    """Raise `VerificationError` if logits are not finite, or their number differs from that of the labels, if any."""
    if not np.isfinite(logits).all():
        raise VerificationError(f"{task}: the graph returned NaN or infinity; was it run without its adapter?")
    if labels and logits.shape[-1] != len(labels):
        raise VerificationError(
            f"{task}: the graph returned {logits.shape[-1]} logits, but the config has {len(labels)} labels"
        )


def predictions(
    logits: NDArray[np.float32], labels: Sequence[str], top_k: int, problem_type: str | None = None
) -> list[Prediction]:
    """The `top_k` best labels for logits (labels,). `problem_type` selects the kind of score, as in transformers."""
    wide = logits.astype(np.float64)
    if len(labels) == 1 or problem_type == "regression":
        scores = wide
    elif problem_type == "multi_label_classification":
        scores = np.exp(-np.logaddexp(0, -wide))
    else:
        exponentials = np.exp(wide - wide.max())
        scores = exponentials / exponentials.sum()
    return [Prediction(labels[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:top_k]]
