"""What a `TaskServer` returns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peanut_serve.classify.serving.answering import Result
from peanut_serve.classify.serving.batching import Outputs
from peanut_serve.classify.serving.version import TaskVersion


@dataclass(frozen=True)
class Answered:
    """Answers, and the version that gave them.

    Attributes:
        version: its name and digest.
        answers: one for each input, in order.
    """

    version: TaskVersion
    answers: Sequence[Result]


@dataclass(frozen=True)
class Inferred:
    """The outputs of a graph, and the version that gave them.

    Attributes:
        version: its name and digest.
        rows: the outputs of each input (1, ...), in order; those of token classifiers differ in length.
    """

    version: TaskVersion
    rows: Sequence[Outputs]


def as_matrix(rows: Sequence[Outputs], index: int) -> NDArray[np.float32]:
    """One output of all inputs as (inputs, ...); shorter ones are filled with 0."""
    found = [row[index] for row in rows]
    shape = tuple(max(sizes) for sizes in zip(*(one.shape[1:] for one in found), strict=True))
    whole = np.zeros((len(found), *shape), np.float32)
    for place, one in enumerate(found):
        own: tuple[slice, ...] = tuple(slice(0, size) for size in one.shape[1:])
        whole[place][own] = one[0]
    return whole
