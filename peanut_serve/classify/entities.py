"""Turns the logits of tokens into labelled parts of a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_OUTSIDE = "O"  # label of tokens outside of entities
_BEGIN, _INSIDE = "B-", "I-"  # prefixes of labels

Span = tuple[int, int]


@dataclass(frozen=True)
class Entity:
    """A labelled part of a text.

    Attributes:
        text: the part itself.
        label: its label, without `B-` or `I-`.
        score: mean probability of the labels of its tokens.
        start: index of its first character in the text.
        end: index after its last character.
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
    text: str,
    logits: NDArray[np.float32],
    spans: Sequence[Span | None],
    labels: Sequence[str],
    ignored: Sequence[str] = (_OUTSIDE,),
) -> list[Entity]:
    """Group neighbouring tokens with the same label into entities; a `B-` label begins a new one.

    Equivalent to transformers' `TokenClassificationPipeline` with `aggregation_strategy="simple"`.

    Args:
        text: the text that was tokenised.
        logits: (tokens, labels); rows beyond the spans are padding.
        spans: position of each token in the text; None for special tokens.
        labels: names of the labels.
        ignored: labels of entities that are left out.
    """
    groups: list[list[_Token]] = []
    for token in _tokens(logits, spans, labels):
        if groups and token.label == groups[-1][-1].label and not token.begins:
            groups[-1].append(token)
        else:
            groups.append([token])
    return [_entity(text, group) for group in groups if group[0].label not in ignored]


def find_tokens(
    text: str,
    logits: NDArray[np.float32],
    spans: Sequence[Span | None],
    labels: Sequence[str],
    ignored: Sequence[str] = (_OUTSIDE,),
) -> list[tuple[int, Entity]]:
    """The index and label of every token, whole, with `B-` or `I-`, but for those with ignored labels.

    Equivalent to transformers' `TokenClassificationPipeline` with `aggregation_strategy="none"`. Takes the arguments
    of `find_entities`.
    """
    found = []
    for index, (row, span) in enumerate(zip(logits.astype(np.float64), spans, strict=False)):
        label = labels[row.argmax()]
        if span is not None and label not in ignored:
            score = float(1 / np.exp(row - row.max()).sum())
            found.append((index, Entity(text[slice(*span)], label, score, *span)))
    return found


def _tokens(logits: NDArray[np.float32], spans: Sequence[Span | None], labels: Sequence[str]) -> list[_Token]:
    """The tokens that have a position in the text, each with its best label."""
    tokens = []
    for row, span in zip(logits.astype(np.float64), spans, strict=False):
        if span is not None:
            label = labels[row.argmax()]
            score = float(1 / np.exp(row - row.max()).sum())
            name = label[2:] if label.startswith((_BEGIN, _INSIDE)) else label
            tokens.append(_Token(name, label.startswith(_BEGIN), score, span))
    return tokens


def _entity(text: str, group: Sequence[_Token]) -> Entity:
    start, end = group[0].span[0], group[-1].span[1]
    score = sum(token.score for token in group) / len(group)
    return Entity(text[start:end], group[0].label, score, start, end)
