"""Turns the outputs of a row into what was asked for: labels, entities, parts of a text, or an embedding."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from converters.errors import OptionError
from peanut_serve.classify.answers import Answer, find_answers
from peanut_serve.classify.entities import Entity, find_entities, find_tokens
from peanut_serve.classify.predictions import Function, Prediction, predictions
from peanut_serve.classify.serving.batching import Outputs
from peanut_serve.classify.serving.preparing import Prepared
from peanut_serve.classify.tasks import OnnxTask

# labels; entities; tokens with their indices; answers; features (width,), (tokens, width) or (patches, width)
Result = list[Prediction] | list[Entity] | list[tuple[int, Entity]] | list[Answer] | NDArray[np.float32]

_MOST_ANSWERS = 1000  # to a question: each pair of tokens is one


@dataclass(frozen=True)
class Ask:
    """How answers are wanted.

    Attributes:
        top_k: the most labels, or answers to a question.
        function: turns logits into scores; by default the one that the config of the task implies.
        aggregation: whether neighbouring tokens of one label become an entity.
        ignored: labels of entities that are left out.
        normalize: whether embeddings get length 1.
        truncate: whether a text that is too long for the model is cut, or refused.
    """

    top_k: int = 5
    function: Function | None = None
    aggregation: Literal["simple", "none"] = "simple"
    ignored: tuple[str, ...] = ("O",)
    normalize: bool = False
    truncate: bool = False


def check_ask(task: OnnxTask, ask: Ask) -> None:
    """Raise `OptionError` if a task cannot give what is asked for."""
    if ask.top_k < 1:
        raise OptionError(f"top_k is {ask.top_k}, expected 1 or more")
    if task.kind.task == "question-answering" and ask.top_k > _MOST_ANSWERS:
        raise OptionError(f"top_k is {ask.top_k}, expected at most {_MOST_ANSWERS}")
    if ask.normalize and task.kind.task not in ("sentence-similarity",):
        raise OptionError(f"normalize: {task.name} does {task.kind.task}, which gives no single embedding")
    if ask.truncate and task.kind.task in ("token-classification", "question-answering"):
        raise OptionError("truncate: what is in the rest would be missing; split the text")


def answer(task: OnnxTask, outputs: Outputs, ask: Ask, prepared: Prepared) -> Result:
    """The answer for one input.

    Args:
        task: that was run.
        outputs: of the graph, (1, ...).
        ask: how the answer is wanted.
        prepared: the input; of a token classifier and for questions, with the text and the places of its tokens.
    """
    row, text, spans = outputs[0][0], prepared.text, prepared.spans or ()
    if task.kind.task == "token-classification":
        if ask.aggregation == "simple":
            return find_entities(text, row, spans, task.labels, ask.ignored)
        return find_tokens(text, row, spans, task.labels, ask.ignored)
    if task.kind.task == "question-answering":
        return find_answers(text, row, outputs[1][0], spans, ask.top_k)
    if task.kind.has_labels:
        return predictions(row, task.labels, ask.top_k, task.problem_type, ask.function)
    features: NDArray[np.float32] = row
    if ask.normalize:
        features = (row / max(float(np.linalg.norm(row)), 1e-12)).astype(np.float32)
    return features
