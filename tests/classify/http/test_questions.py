"""Hugging Face's protocol: what a body asks, without a server."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from converters.errors import OptionError
from converters.inference.kinds import ModelKind
from peanut_serve.classify.entities import Entity
from peanut_serve.classify.http.hugging_face import ask_of, inputs_of, read_question, write_answers
from peanut_serve.classify.predictions import Prediction
from peanut_serve.classify.serving.answering import Ask
from peanut_serve.errors import RequestBodyError


def task(kind: str) -> Any:
    inputs = ("pixel_values",) if "image" in kind else ("input_ids", "attention_mask")
    return SimpleNamespace(name="mood", kind=ModelKind(kind, inputs, ("logits",)))


IMAGES, TEXTS = task("image-classification"), task("text-classification")
TOKENS, SENTENCES = task("token-classification"), task("sentence-similarity")
JSON = "application/json; charset=utf-8"


def question(**value: object) -> Any:
    return read_question(json.dumps(value).encode(), JSON)


def test_a_body_is_an_image_or_json() -> None:
    assert inputs_of(read_question(b"\x89PNG", "image/png"), IMAGES) == [b"\x89PNG"]
    assert inputs_of(read_question(b"\x89PNG", ""), IMAGES) == [b"\x89PNG"]
    assert inputs_of(question(inputs=base64.b64encode(b"\x89PNG").decode()), IMAGES) == [b"\x89PNG"]
    assert inputs_of(question(inputs=["a", "b"]), TEXTS) == ["a", "b"]
    assert inputs_of(question(inputs={"text": "a", "text_pair": "b"}), TEXTS) == [("a", "b")]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is empty"),
        (b'{"inputs"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["a text"]', "expected a JSON object with inputs"),
        (b'{"text": "a"}', "expected a JSON object with inputs"),
        (b'{"inputs": "a", "parameters": [1]}', "parameters is not a JSON object"),
    ],
)
def test_other_bodies_are_refused(body: bytes, said: str) -> None:
    with pytest.raises(RequestBodyError, match=said):
        read_question(body, JSON if body else "image/png")


@pytest.mark.parametrize(
    "given", ["http://127.0.0.1/a.png", "/etc/passwd", "file:///etc/passwd", "a.png", "~/x", "é"]
)
def test_a_path_or_url_is_not_opened(tmp_path: Path, given: str) -> None:
    with pytest.raises(OptionError, match="paths and URLs are never opened"):
        inputs_of(question(inputs=given), IMAGES)


@pytest.mark.parametrize(
    ("of", "given", "said"),
    [
        (IMAGES, 7, "a JSON int, expected an image in base64"),
        (TEXTS, 7, "a JSON int, expected a text or an object"),
        (TEXTS, {"text": "a"}, "a JSON dict, expected a text or an object"),
        (TOKENS, {"text": "a", "text_pair": "b"}, "a JSON dict, expected a text$"),
    ],
)
def test_inputs_of_another_type_are_refused(of: Any, given: object, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        inputs_of(question(inputs=given), of)


def test_parameters_are_followed() -> None:
    found = ask_of(question(inputs="a", parameters={"top_k": 2, "function_to_apply": "sigmoid"}), TEXTS)
    assert found == Ask(top_k=2, function="sigmoid")
    found = ask_of(question(inputs="a", normalize=True, truncate=True, prompt_name=None), SENTENCES)
    assert found == Ask(normalize=True, truncate=True)
    given = {"aggregation_strategy": "none", "ignore_labels": []}
    assert ask_of(question(inputs="a", parameters=given), TOKENS) == Ask(aggregation="none", ignored=())


@pytest.mark.parametrize(
    ("of", "given", "said"),
    [
        (TEXTS, {"stride": 1}, "does not support the parameter stride; supported: top_k"),
        (TEXTS, {"options": {"use_cache": False}}, "does not support the parameter options"),
        (TOKENS, {"stride": 1}, "does not support the parameter stride"),
        (TOKENS, {"aggregation_strategy": "first"}, "aggregation_strategy is first, which is not supported"),
        (TOKENS, {"ignore_labels": "O"}, "expected a list of labels"),
        (TEXTS, {"function_to_apply": "tanh"}, "expected softmax or sigmoid or none"),
        (TEXTS, {"top_k": 1.5}, "top_k is 1.5"),
        (TEXTS, {"top_k": True}, "top_k is True"),
        (SENTENCES, {"prompt_name": "query"}, "does not support the parameter prompt_name"),
        (SENTENCES, {"truncation_direction": "left"}, "truncation_direction is left"),
        (SENTENCES, {"normalize": "yes"}, "expected true or false"),
        (SENTENCES, {"dimensions": 8}, "does not support the parameter dimensions"),
        (IMAGES, {"truncate": True}, "does not support the parameter truncate"),
    ],
)
def test_a_parameter_that_cannot_be_followed_is_refused(of: Any, given: dict[str, object], said: str) -> None:
    for asked in (question(inputs="a", parameters=given), question(inputs="a", **given)):
        with pytest.raises(OptionError, match=said):
            ask_of(asked, of)


def test_answers_have_the_shapes_of_the_hosted_inference() -> None:
    labels = [[Prediction("good", 0.75)]]
    assert json.loads(write_answers(IMAGES, labels, False)) == [{"label": "good", "score": 0.75}]
    assert json.loads(write_answers(IMAGES, labels, True)) == [[{"label": "good", "score": 0.75}]]
    assert json.loads(write_answers(TEXTS, labels, False)) == [[{"label": "good", "score": 0.75}]]
    entity = Entity("Paris", "LOC", 0.5, 3, 8)
    place = {"score": 0.5, "word": "Paris", "start": 3, "end": 8}
    assert json.loads(write_answers(TOKENS, [[entity]], False)) == [{"entity_group": "LOC", **place}]
    assert json.loads(write_answers(TOKENS, [[(2, entity)]], False)) == [{"entity": "LOC", "index": 2, **place}]
    vector = np.array([0.5, 1], np.float32)
    assert json.loads(write_answers(SENTENCES, [vector], False)) == [0.5, 1]
    assert json.loads(write_answers(SENTENCES, [vector], True)) == [[0.5, 1]]
