"""Turns logits into labels with scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from converters.errors import VerificationError

Function = Literal["softmax", "sigmoid", "none"]


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


def function_for(labels: Sequence[str], problem_type: str | None) -> Function:
    """The function that turns logits into scores, as in transformers; a single label is a number."""
    if len(labels) == 1 or problem_type == "regression":
        return "none"
    return "sigmoid" if problem_type == "multi_label_classification" else "softmax"


def scores(logits: NDArray[np.float32], function: Function) -> NDArray[np.float64]:
    """Scores of logits (labels,): probabilities, or the logits themselves."""
    wide = logits.astype(np.float64)
    if function == "none":
        return wide
    if function == "sigmoid":
        sigmoid: NDArray[np.float64] = np.exp(-np.logaddexp(0, -wide))
        return sigmoid
    exponentials = np.exp(wide - wide.max())
    softmax: NDArray[np.float64] = exponentials / exponentials.sum()
    return softmax


def predictions(
    logits: NDArray[np.float32],
    labels: Sequence[str],
    top_k: int,
    problem_type: str | None = None,
    function: Function | None = None,
) -> list[Prediction]:
    """The `top_k` best labels for logits (labels,).

    Args:
        logits: of one input.
        labels: names of the classes.
        top_k: the most labels to return.
        problem_type: of the config; selects the function.
        function: one that is used instead.
    """
    found = scores(logits, function or function_for(labels, problem_type))
    return [Prediction(labels[i], float(found[i])) for i in np.argsort(-found, kind="stable")[:top_k]]
