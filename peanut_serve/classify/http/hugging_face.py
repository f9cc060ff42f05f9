"""Hugging Face's inference protocol: what a request asks, and how the answers are written.

The shapes are those of the hosted inference and of `huggingface_hub.InferenceClient`:

- image classification: `[{label, score}]`; for a list of images, a list of these;
- text classification: `[[{label, score}]]`, one inner list per text;
- token classification: `[{entity_group, score, word, start, end}]`, for a list of texts a list of these; `word` is
  the part of the text itself, not of the tokenizer's lower-cased text;
- features: `[width]` of an embedding, `[tokens][width]` of a model without a head; for a list of texts, a list of
  these.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast, get_args

import numpy as np

from converters.errors import OptionError
from converters.inference.examples import Example
from peanut_serve.classify.entities import Entity
from peanut_serve.classify.predictions import Function
from peanut_serve.classify.serving.answering import Answer, Ask
from peanut_serve.classify.tasks import OnnxTask
from peanut_serve.errors import RequestBodyError, shown

_CLASSES = ("top_k", "function_to_apply")
# what the parameters of each task may be
_PARAMETERS = {
    "image-classification": _CLASSES,
    "text-classification": (*_CLASSES, "truncate"),
    "token-classification": ("aggregation_strategy", "ignore_labels"),
    "feature-extraction": ("truncate", "truncation_direction"),
    "sentence-similarity": ("normalize", "truncate", "truncation_direction"),
    "image-feature-extraction": (),
}
_NO_PATH = "send the image itself as the body, or in base64 as inputs; paths and URLs are never opened"


@dataclass(frozen=True)
class Question:
    """A request, as far as it can be understood without knowing the task.

    Attributes:
        inputs: the content of an image; or JSON values.
        is_list: whether the request had a list of inputs.
        parameters: how answers are wanted.
    """

    inputs: Sequence[Any]
    is_list: bool
    parameters: Mapping[str, Any]


def read_question(body: bytes, content_type: str) -> Question:
    """The question in a body: JSON with `inputs`, or an image. Raises `RequestBodyError` if it is neither."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        if not body:
            raise RequestBodyError("the body is empty; send an image, or JSON with inputs (as application/json)")
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
    return Question(inputs if isinstance(inputs, list) else [inputs], isinstance(inputs, list), parameters)


def inputs_of(question: Question, task: OnnxTask) -> list[Example]:
    """The inputs as the task takes them. Raises `OptionError` for one that it does not take."""
    if task.kind.takes_files:
        return [_image(one) for one in question.inputs]
    return [_text(one, task) for one in question.inputs]


def _image(given: Any) -> bytes:
    if isinstance(given, bytes):
        return given
    if not isinstance(given, str):
        raise OptionError(f"an input is a JSON {type(given).__name__}, expected an image in base64; {_NO_PATH}")
    try:
        return base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError):
        raise OptionError(f"the input {shown(given)!r} is not base64; {_NO_PATH}") from None


def _text(given: Any, task: OnnxTask) -> Example:
    if isinstance(given, bytes):
        raise OptionError(f'{task.name} takes texts; send JSON like {{"inputs": "a text"}} as application/json')
    if isinstance(given, str):
        return given
    if task.kind.task == "text-classification" and isinstance(given, dict) and set(given) == {"text", "text_pair"}:
        first, second = given["text"], given["text_pair"]
        if isinstance(first, str) and isinstance(second, str):
            return first, second
    raise OptionError(
        f"an input is a JSON {type(given).__name__}, expected a text"
        + (" or an object of text and text_pair" if task.kind.task == "text-classification" else "")
    )


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
    top_k = given.get("top_k", Ask.top_k)
    if type(top_k) is not int:
        raise OptionError(f"top_k is {shown(str(top_k))}, expected a number of labels")
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


def write_answers(task: OnnxTask, answers: Sequence[Answer], is_list: bool) -> bytes:
    """The body of a response."""
    written = [_written(one) for one in answers]
    nests = is_list or task.kind.task == "text-classification"
    return json.dumps(written if nests else written[0]).encode()


def _written(answer: Answer) -> Any:
    if isinstance(answer, np.ndarray):
        return answer.tolist()
    return [_element(one) for one in answer]


def _element(one: Any) -> dict[str, Any]:
    if isinstance(one, tuple):
        index, entity = one
        return {"entity": entity.label, "index": index, **_place(entity)}
    return {"entity_group": one.label, **_place(one)} if isinstance(one, Entity) else asdict(one)


def _place(entity: Entity) -> dict[str, Any]:
    return {"score": entity.score, "word": entity.text, "start": entity.start, "end": entity.end}
