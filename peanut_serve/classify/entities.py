"""From the logits of tokens to the parts of a text that have a label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_OUTSIDE = "O"  # the label of tokens that are of no entity
_BEGINS, _GOES_ON = "B-", "I-"  # before a label

Span = tuple[int, int]


@dataclass(frozen=True)
class Entity:
    """A part of a text, and what it is.

    Attributes:
        text: the part.
        label: what it is, without `B-` or `I-`.
        score: mean probability of the labels of its tokens.
        start: of its first character, in the text.
        end: behind its last one.
    """

    text: str
    label: str
    score: float
    start: int
    end: int


class _Token(NamedTuple):
    label: str
    begins: bool
    score: float
    span: Span


def find_entities(
    text: str, logits: NDArray[np.float32], spans: Sequence[Span | None], labels: Sequence[str]
) -> list[Entity]:
    """Neighbouring tokens of one label are an entity, unless one of them begins another (`B-`).

    As transformers' `TokenClassificationPipeline` with `aggregation_strategy="simple"`.

    Args:
        text: what was tokenised.
        logits: (tokens, labels); rows beyond the spans are padding.
        spans: where each token lies in the text; None for special ones.
        labels: names of the labels.
    """
    groups: list[list[_Token]] = []
    for token in _tokens(logits, spans, labels):
        if groups and token.label == groups[-1][-1].label and not token.begins:
            groups[-1].append(token)
        else:
            groups.append([token])
    return [_entity(text, group) for group in groups if group[0].label != _OUTSIDE]


def _tokens(logits: NDArray[np.float32], spans: Sequence[Span | None], labels: Sequence[str]) -> list[_Token]:
    """Those of the text, each with its best label."""
    tokens = []
    for row, span in zip(logits.astype(np.float64), spans, strict=False):
        if span is not None:
            label = labels[row.argmax()]
            score = float(1 / np.exp(row - row.max()).sum())
            name = label[2:] if label.startswith((_BEGINS, _GOES_ON)) else label
            tokens.append(_Token(name, label.startswith(_BEGINS), score, span))
    return tokens


def _entity(text: str, group: Sequence[_Token]) -> Entity:
    start, end = group[0].span[0], group[-1].span[1]
    score = sum(token.score for token in group) / len(group)
    return Entity(text[start:end], group[0].label, score, start, end)
