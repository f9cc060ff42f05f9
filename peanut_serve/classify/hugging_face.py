"""Hugging Face's inference protocol: what a request asks, and how the answers are written.

The shapes are those of the hosted inference and of `huggingface_hub.InferenceClient`:

- image and audio classification: `[{label, score}]`; for a list of files, a list of these;
- text classification: `[[{label, score}]]`, one inner list per text;
- token classification: `[{entity_group, score, word, start, end}]`, for a list of texts a list of these; `word` is
  the part of the text itself, not of the tokenizer's lower-cased text;
- question answering: `{answer, score, start, end}`, or with `top_k` a list of these;
- features: `[width]` of an embedding, `[tokens][width]` of a model without a head; for a list of texts, a list of
  these;
- sentence similarity: the similarity of a sentence to each other one.

Nothing that a body names is opened: an image or a sound is its content, never a path or URL.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np

from converters.errors import OptionError
from converters.inference.examples import Example
from converters.inference.kinds import ModelKind
from peanut_serve.classify.answers import Answer
from peanut_serve.classify.entities import Entity
from peanut_serve.classify.predictions import Function
from peanut_serve.classify.serving.answering import Ask, Result
from peanut_serve.classify.tasks import OnnxTask
from peanut_serve.errors import RequestBodyError, shown

_CLASSES = ("top_k", "function_to_apply")
# what the parameters of each task may be
_PARAMETERS = {
    "image-classification": _CLASSES,
    "audio-classification": _CLASSES,
    "text-classification": (*_CLASSES, "truncate"),
    "token-classification": ("aggregation_strategy", "ignore_labels"),
    "question-answering": ("top_k",),
    "feature-extraction": ("truncate", "truncation_direction"),
    "sentence-similarity": ("normalize", "truncate", "truncation_direction"),
    "image-feature-extraction": (),
}
# the two texts of an input, for the tasks that take pairs
_PAIRS = {"text-classification": ("text", "text_pair"), "question-answering": ("question", "context")}
_COMPARED = ("source_sentence", "sentences")
_NO_PATH = "send it as the body, or in base64 as inputs; paths and URLs are never opened"
_NO_ANSWER = {"answer": "", "score": 0.0, "start": 0, "end": 0}


@dataclass(frozen=True)
class Question:
    """A request, as far as it can be understood without knowing the task.

    Attributes:
        inputs: the content of a file; or JSON values.
        is_list: whether the request had a list of inputs.
        parameters: how answers are wanted.
        compares: whether the similarity of the first input to each other one is wanted.
    """

    inputs: Sequence[Any]
    is_list: bool
    parameters: Mapping[str, Any]
    compares: bool = False


def read_question(body: bytes, content_type: str) -> Question:
    """The question in a body: JSON with `inputs`, or a file. Raises `RequestBodyError` if it is neither."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        if not body:
            raise RequestBodyError("the body is empty; send a file, or JSON with inputs (as application/json)")
        return Question([body], False, {})
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestBodyError("the body is not valid JSON") from None
    if not isinstance(value, dict) or "inputs" not in value:
        raise RequestBodyError('expected a JSON object with inputs, like {"inputs": "a text"}')
    nested = value.get("parameters") or {}
    if not isinstance(nested, dict):
        raise RequestBodyError("parameters is not a JSON object")
    beside = {key: one for key, one in value.items() if key not in ("inputs", "parameters")}
    parameters = {key: one for key, one in {**nested, **beside}.items() if one is not None}
    inputs = value["inputs"]
    if isinstance(inputs, dict) and set(inputs) == set(_COMPARED) and isinstance(inputs["sentences"], list):
        return Question([inputs["source_sentence"], *inputs["sentences"]], True, parameters, compares=True)
    return Question(inputs if isinstance(inputs, list) else [inputs], isinstance(inputs, list), parameters)


def inputs_of(question: Question, task: OnnxTask) -> list[Example]:
    """The inputs as the task takes them. Raises `OptionError` for one that it does not take."""
    if question.compares and (task.kind.task != "sentence-similarity" or len(question.inputs) < 2):
        raise OptionError(
            f"{task.name} ({task.kind.task}) cannot compare {len(question.inputs) - 1} sentences with another; "
            "models for sentence-similarity compare one or more"
        )
    if task.kind.takes_files:
        return [_file(one, task) for one in question.inputs]
    return [_texts(one, task) for one in question.inputs]


def _file(given: Any, task: OnnxTask) -> bytes:
    if isinstance(given, bytes):
        return given
    what = "an image" if "image" in task.kind.task else "a sound"
    if not isinstance(given, str):
        raise OptionError(f"an input is a JSON {type(given).__name__}, expected {what} in base64; {_NO_PATH}")
    try:
        return base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError):
        raise OptionError(f"the input {shown(given)!r} is not {what} in base64; {_NO_PATH}") from None


def _texts(given: Any, task: OnnxTask) -> Example:
    """A text, or a pair of them where the task takes pairs."""
    pair = _PAIRS.get(task.kind.task)
    if isinstance(given, bytes):
        raise OptionError(f'{task.name} takes texts; send JSON like {{"inputs": "a text"}} as application/json')
    if isinstance(given, str) and task.kind.task != "question-answering":
        return _text(given)
    if pair and isinstance(given, dict) and set(given) == set(pair):
        first, second = (given[name] for name in pair)
        if isinstance(first, str) and isinstance(second, str):
            return _text(first), _text(second)
    wanted = [*(["a text"] if task.kind.task != "question-answering" else [])]
    wanted += [f"an object of {' and '.join(pair)}"] if pair else []
    raise OptionError(f"an input is a JSON {type(given).__name__}, expected {' or '.join(wanted)}")


def _text(given: str) -> str:
    try:
        given.encode()
    except UnicodeEncodeError:
        raise OptionError("a text has half a surrogate pair, expected valid Unicode") from None
    return given


def ask_of(question: Question, task: OnnxTask) -> Ask:
    """How the answers are wanted. Raises `OptionError` for a parameter that this task cannot follow."""
    given, allowed = question.parameters, _PARAMETERS[task.kind.task]
    if unknown := sorted(given.keys() - set(allowed)):
        raise OptionError(
            f"{task.name} ({task.kind.task}) does not support the parameter {shown(unknown[0])}; supported: "
            f"{', '.join(allowed) or 'none'}"
        )
    ignored = given.get("ignore_labels", ["O"])
    if not isinstance(ignored, list) or not all(isinstance(one, str) for one in ignored):
        raise OptionError(f"ignore_labels is {shown(str(ignored))}, expected a list of labels")
    top_k = given.get("top_k", 1 if task.kind.task == "question-answering" else Ask.top_k)
    if type(top_k) is not int:
        raise OptionError(f"top_k is {shown(str(top_k))}, expected a whole number")
    _choice(given, "truncation_direction", "right")
    return Ask(
        top_k=top_k,
        function=cast("Function | None", _choice(given, "function_to_apply", *get_args(Function))),
        aggregation=cast(Any, _choice(given, "aggregation_strategy", "simple", "none") or "simple"),
        ignored=tuple(ignored),
        normalize=_flag(given, "normalize"),
        truncate=_flag(given, "truncate"),
    )


def _choice(given: Mapping[str, Any], name: str, *allowed: str) -> str | None:
    value = given.get(name)
    if value is not None and value not in allowed:
        raise OptionError(f"{name} is {shown(str(value))}, which is not supported; expected {' or '.join(allowed)}")
    return value


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {shown(str(value))}, expected true or false")
    return value


def write_answers(kind: ModelKind, question: Question, results: Sequence[Result]) -> bytes:
    """The body of a response to a question that `ask_of` has accepted."""
    if question.compares:
        return json.dumps(_similarities(results)).encode()
    is_single = kind.task == "question-answering" and question.parameters.get("top_k", 1) == 1
    written = [_written(one, is_single) for one in results]
    nests = question.is_list or kind.task == "text-classification"
    return json.dumps(written if nests else written[0]).encode()


def _written(result: Result, is_single: bool) -> Any:
    if isinstance(result, np.ndarray):
        return result.tolist()
    elements = [_element(one) for one in result]
    return next(iter(elements), _NO_ANSWER) if is_single else elements


def _element(one: Any) -> dict[str, Any]:
    if isinstance(one, tuple):
        index, entity = one
        return {"entity": entity.label, "index": index, **_place(entity)}
    if isinstance(one, Entity):
        return {"entity_group": one.label, **_place(one)}
    if isinstance(one, Answer):
        return {"answer": one.text, "score": one.score, "start": one.start, "end": one.end}
    return {"label": one.label, "score": one.score}


def _place(entity: Entity) -> dict[str, Any]:
    return {"score": entity.score, "word": entity.text, "start": entity.start, "end": entity.end}


def _similarities(embeddings: Sequence[Any]) -> list[float]:
    """The cosine of the angle between the first embedding and each other one."""
    first, *others = (np.asarray(one, np.float64) for one in embeddings)
    lengths = [float(np.linalg.norm(first) * np.linalg.norm(one)) for one in others]
    return [float(first @ one) / length if length else 0.0 for one, length in zip(others, lengths, strict=True)]
