"""Requests and answers of classifiers in the form of Hugging Face's inference API, as `InferenceClient` speaks it.

A body is an image or a sound as it is, or JSON: `inputs`, one or a list, and `parameters`. Texts are given as they
are, images and sounds in base64. Nothing that a body names is opened.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from converters.errors import OptionError
from converters.inference.examples import Example
from converters.inference.images import image_size
from converters.inference.kinds import ModelKind
from converters.inference.sounds import read_sound
from peanut_serve.classify.engine import OnnxEngine
from peanut_serve.errors import RequestBodyError, RequestTooLargeError, shown

_LABELS = ("image-classification", "audio-classification", "text-classification")
_TOKENS, _QUESTIONS, _SENTENCES = "token-classification", "question-answering", "sentence-similarity"
SERVED = (*_LABELS, _TOKENS, _QUESTIONS, _SENTENCES)  # the tasks that have this form

_MOST_INPUTS = 64
_MOST_CHARACTERS = 100_000  # of a text
_MOST_PIXELS = 40_000_000
_MOST_SECONDS = 60  # of a sound: the memory of attention grows with its square
_MOST_ANSWERS = 1000
_TOP_K = 5  # as in transformers' pipelines
_SIMPLE = "simple"  # how tokens become entities, see `find_entities`


@dataclass(frozen=True)
class Asked:
    """What a request asks.

    Attributes:
        examples: what the model runs on.
        several: whether the client sent a list, and so gets one.
        top_k: the most labels or answers to each example.
        compares: whether the answer is the similarity of the first example to each other one.
    """

    examples: tuple[Example, ...]
    several: bool = False
    top_k: int = _TOP_K
    compares: bool = False


def read_request(kind: ModelKind, content_type: str, body: bytes) -> Asked:
    """Read the body of a request for a model of this kind.

    Raises:
        RequestBodyError: the body is not in this form, an input is not what the model takes, or a parameter is not
            supported.
        RequestTooLargeError: there are too many inputs, or one is too large.
    """
    if kind.takes_files and not content_type.lower().startswith("application/json"):
        return Asked((_checked(kind, body),))
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestBodyError("the body is not valid JSON; expected an object with inputs") from None
    if not isinstance(value, dict) or "inputs" not in value:
        raise RequestBodyError("the body has no inputs; expected a JSON object with inputs, and parameters if any")
    if unknown := sorted(value.keys() - {"inputs", "parameters"}):
        raise RequestBodyError(f"the body has an unknown field {shown(unknown[0])}; expected inputs and parameters")
    top_k, inputs = _top_k(kind, value.get("parameters")), value["inputs"]
    if kind.task == _SENTENCES and isinstance(inputs, dict):
        return Asked(_compared(kind, inputs), compares=True)
    several = isinstance(inputs, list)
    given = inputs if several else [inputs]
    if not 1 <= len(given) <= _MOST_INPUTS:
        raise RequestTooLargeError(f"there are {len(given)} inputs; expected 1 to {_MOST_INPUTS}")
    return Asked(tuple(_example(kind, one) for one in given), several, top_k)


def compute(engine: OnnxEngine, task: str, examples: Sequence[Example], top_k: int) -> list[Any]:
    """The answer to each example as JSON values, or the embedding, with at most `top_k` labels or answers.

    Raises the errors of `OnnxEngine.predict`.
    """
    kind = engine.find(task).kind
    if kind.task == _TOKENS:
        texts = [one for one in examples if isinstance(one, str)]
        return [
            [
                {"entity_group": one.label, "score": one.score, "word": one.text, "start": one.start, "end": one.end}
                for one in found
            ]
            for found in engine.entities(texts, task)
        ]
    if kind.task == _QUESTIONS:
        pairs = [one for one in examples if isinstance(one, tuple)]
        return [
            [{"answer": one.text, "score": one.score, "start": one.start, "end": one.end} for one in found]
            for found in engine.answers(pairs, task, top_k)
        ]
    if kind.task == _SENTENCES:
        texts = [one for one in examples if isinstance(one, str)]
        return [embedding.tolist() for embedding in engine.embeddings(texts, task)]
    return [[asdict(one) for one in found] for found in engine.predict(examples, task, top_k)]


def answer(kind: ModelKind, asked: Asked, found: Sequence[Any]) -> Any:
    """The JSON value of a response.

    Args:
        kind: the kind of the model.
        asked: the request.
        found: what `compute` gave for each example; if with a larger `top_k`, the rest is cut off.
    """
    if asked.compares:
        return _similarities(found)
    if kind.task == _SENTENCES:
        return list(found) if asked.several else found[0]
    cut = list(found) if kind.task == _TOKENS else [one[: asked.top_k] for one in found]
    if kind.task == _QUESTIONS and asked.top_k == 1:
        cut = [one[0] if one else {"answer": "", "score": 0.0, "start": 0, "end": 0} for one in cut]
    return cut if asked.several or kind.task == "text-classification" else cut[0]


def _top_k(kind: ModelKind, given: Any) -> int:
    parameters = {} if given is None else given
    if not isinstance(parameters, dict):
        raise RequestBodyError(f"parameters is a JSON {type(given).__name__}; expected an object")
    set_ones = {name: value for name, value in parameters.items() if value is not None}
    if kind.task == _TOKENS and set_ones.get("aggregation_strategy") == _SIMPLE:
        del set_ones["aggregation_strategy"]
    default = 1 if kind.task == _QUESTIONS else _TOP_K
    top_k = set_ones.pop("top_k", default) if kind.task in (*_LABELS, _QUESTIONS) else default
    if set_ones:
        known = {_TOKENS: f"aggregation_strategy {_SIMPLE}", _SENTENCES: "none"}.get(kind.task, "top_k")
        raise RequestBodyError(f"the parameter {shown(min(set_ones))} is not supported; supported: {known}")
    if type(top_k) is not int or not 1 <= top_k <= _MOST_ANSWERS:
        raise RequestBodyError(f"top_k is {shown(str(top_k))}; expected a whole number from 1 to {_MOST_ANSWERS}")
    return top_k


def _example(kind: ModelKind, value: Any) -> Example:
    if kind.takes_files:
        return _checked(kind, _decoded(value))
    if kind.task == _QUESTIONS:
        return _two(value, "question", "context")
    if kind.task == "text-classification" and isinstance(value, dict):
        return _two(value, "text", "text_pair")
    return _text(value, "an input")


def _two(value: Any, first: str, second: str) -> tuple[str, str]:
    if not isinstance(value, dict) or value.keys() != {first, second}:
        raise RequestBodyError(f"an input is not what the model takes; expected an object with {first} and {second}")
    return _text(value[first], first), _text(value[second], second)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RequestBodyError(f"{name} is a JSON {type(value).__name__}; expected a text")
    if len(value) > _MOST_CHARACTERS:
        raise RequestTooLargeError(f"{name} has {len(value)} characters; expected at most {_MOST_CHARACTERS}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestBodyError(f"{name} has half a surrogate pair; expected valid Unicode") from None
    return value


def _decoded(value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise RequestBodyError(
            "an input is not base64; expected the content of a file in base64 (paths and addresses are not opened)"
        ) from None


def _checked(kind: ModelKind, content: bytes) -> bytes:
    """The content of a file that is small enough to be decoded."""
    try:
        if kind.task == "image-classification":
            width, height = image_size(content)
            size, limit, unit = width * height, _MOST_PIXELS, "pixels"
        else:
            samples, rate = read_sound(content)
            size, limit, unit = -(-len(samples) // rate), _MOST_SECONDS, "seconds"
    except OptionError as error:
        raise RequestBodyError(str(error)) from None
    if size > limit:
        raise RequestTooLargeError(f"an input has {size} {unit}; expected at most {limit}")
    return content


def _compared(kind: ModelKind, inputs: Mapping[str, Any]) -> tuple[Example, ...]:
    sentences = inputs.get("sentences")
    if inputs.keys() != {"source_sentence", "sentences"} or not isinstance(sentences, list) or not sentences:
        raise RequestBodyError(
            "inputs is not what the model takes; expected texts, or an object with source_sentence and sentences"
        )
    if len(sentences) >= _MOST_INPUTS:
        raise RequestTooLargeError(f"there are {len(sentences)} sentences; expected at most {_MOST_INPUTS - 1}")
    return tuple(_text(one, "a sentence") for one in (inputs["source_sentence"], *sentences))


def _similarities(embeddings: Sequence[Sequence[float]]) -> list[float]:
    """The cosine of the angle between the first embedding and each other one."""
    first, *others = (np.asarray(one, np.float64) for one in embeddings)
    lengths = [float(np.linalg.norm(first) * np.linalg.norm(one)) for one in others]
    return [float(first @ one) / length if length else 0.0 for one, length in zip(others, lengths, strict=True)]
