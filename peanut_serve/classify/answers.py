"""Turns the logits of a question-answering model into parts of the text that was asked about."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]

_LONGEST = 30  # tokens of an answer


@dataclass(frozen=True)
class Answer:
    """A part of a text that answers a question.

    Attributes:
        text: the part itself.
        score: probability of its first token times that of its last, among the tokens of the text.
        start: index of its first character in the text.
        end: index after its last character.
    """

    text: str
    score: float
    start: int
    end: int


def find_answers(
    text: str, start: NDArray[np.float32], end: NDArray[np.float32], spans: Sequence[Span | None], top_k: int
) -> list[Answer]:
    """The best answers, no two of them the same.

    Args:
        text: the text that was asked about.
        start: (tokens,) logits of the first token; entries beyond the spans are padding.
        end: the same of the last token.
        spans: position of each token in the text; None for the question and special tokens.
        top_k: the most answers to return.
    """
    places = [(index, span) for index, span in enumerate(spans) if span is not None]
    tokens = [index for index, _ in places]
    if not tokens:
        return []
    joint = np.outer(_softmax(start[tokens]), _softmax(end[tokens]))
    allowed = np.tril(np.triu(joint), _LONGEST - 1)
    answers: dict[Span, Answer] = {}
    for flat in np.argsort(-allowed, axis=None, kind="stable"):
        first, last = divmod(int(flat), len(tokens))
        if len(answers) == top_k or allowed[first, last] == 0:
            break
        where = (places[first][1][0], places[last][1][1])
        answers.setdefault(where, Answer(text[slice(*where)], float(allowed[first, last]), *where))
    return list(answers.values())


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    exponentials: NDArray[np.float64] = np.exp(wide - wide.max())
    chances: NDArray[np.float64] = exponentials / exponentials.sum()
    return chances
