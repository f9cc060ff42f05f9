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
from peanut_serve.classify.answers import Answer
from peanut_serve.classify.entities import Entity
from peanut_serve.classify.hugging_face import ask_of, inputs_of, read_question, write_answers
from peanut_serve.classify.predictions import Prediction
from peanut_serve.classify.serving.answering import Ask
from peanut_serve.errors import RequestBodyError


def task(kind: str) -> Any:
    files = {"image-classification": ("pixel_values",), "audio-classification": ("input_values",)}
    inputs = files.get(kind, ("input_ids", "attention_mask"))
    return SimpleNamespace(name="mood", kind=ModelKind(kind, inputs, ("logits",)))


IMAGES, TEXTS = task("image-classification"), task("text-classification")
TOKENS, SENTENCES = task("token-classification"), task("sentence-similarity")
SOUNDS, QUESTIONS = task("audio-classification"), task("question-answering")
JSON = "application/json; charset=utf-8"


def question(**value: object) -> Any:
    return read_question(json.dumps(value).encode(), JSON)


def test_a_body_is_a_file_or_json() -> None:
    assert inputs_of(read_question(b"\x89PNG", "image/png"), IMAGES) == [b"\x89PNG"]
    assert inputs_of(read_question(b"\x89PNG", ""), IMAGES) == [b"\x89PNG"]
    assert inputs_of(question(inputs=base64.b64encode(b"\x89PNG").decode()), IMAGES) == [b"\x89PNG"]
    assert inputs_of(question(inputs=["a", "b"]), TEXTS) == ["a", "b"]
    assert inputs_of(question(inputs={"text": "a", "text_pair": "b"}), TEXTS) == [("a", "b")]
    assert inputs_of(read_question(b"RIFF", "audio/wav"), SOUNDS) == [b"RIFF"]
    assert inputs_of(question(inputs=base64.b64encode(b"RIFF").decode()), SOUNDS) == [b"RIFF"]
    asked = {"question": "a", "context": "b"}
    assert inputs_of(question(inputs=asked), QUESTIONS) == [("a", "b")]
    assert inputs_of(question(inputs=[asked, asked]), QUESTIONS) == [("a", "b"), ("a", "b")]
    compared = question(inputs={"source_sentence": "a", "sentences": ["b", "c"]})
    assert inputs_of(compared, SENTENCES) == ["a", "b", "c"]


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
        (SOUNDS, 7, "a JSON int, expected a sound in base64"),
        (TEXTS, 7, "a JSON int, expected a text or an object"),
        (TEXTS, {"text": "a"}, "a JSON dict, expected a text or an object of text and text_pair$"),
        (TEXTS, {"text": "a", "text_pair": 1}, "a JSON dict, expected a text or an object"),
        (TEXTS, "\ud800", "half a surrogate pair"),
        (TOKENS, {"text": "a", "text_pair": "b"}, "a JSON dict, expected a text$"),
        (QUESTIONS, "a", "a JSON str, expected an object of question and context$"),
        (QUESTIONS, {"question": "a"}, "a JSON dict, expected an object of question and context$"),
        (TEXTS, {"source_sentence": "a", "sentences": ["b"]}, "cannot compare 1 sentences"),
        (SENTENCES, {"source_sentence": "a", "sentences": []}, "cannot compare 0 sentences"),
        (SENTENCES, {"source_sentence": "a", "sentences": [1]}, "a JSON int, expected a text$"),
        (SENTENCES, {"source_sentence": "a"}, "a JSON dict, expected a text$"),
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
    unset = {"align_to_words": None, "max_answer_len": None}
    assert ask_of(question(inputs="a", parameters=unset), QUESTIONS) == Ask(top_k=1)


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
        (QUESTIONS, {"doc_stride": 8}, "does not support the parameter doc_stride; supported: top_k"),
    ],
)
def test_a_parameter_that_cannot_be_followed_is_refused(of: Any, given: dict[str, object], said: str) -> None:
    for asked in (question(inputs="a", parameters=given), question(inputs="a", **given)):
        with pytest.raises(OptionError, match=said):
            ask_of(asked, of)


def written(of: Any, results: list[Any], **asked: object) -> Any:
    return json.loads(write_answers(of.kind, question(**{"inputs": "a", **asked}), results))


def test_answers_have_the_shapes_of_the_hosted_inference() -> None:
    labels = [[Prediction("good", 0.75)]]
    for of in (IMAGES, SOUNDS):
        assert written(of, labels) == [{"label": "good", "score": 0.75}]
        assert written(of, labels, inputs=["a"]) == [[{"label": "good", "score": 0.75}]]
    assert written(TEXTS, labels) == [[{"label": "good", "score": 0.75}]]
    entity = Entity("Paris", "LOC", 0.5, 3, 8)
    place = {"score": 0.5, "word": "Paris", "start": 3, "end": 8}
    assert written(TOKENS, [[entity]]) == [{"entity_group": "LOC", **place}]
    assert written(TOKENS, [[(2, entity)]]) == [{"entity": "LOC", "index": 2, **place}]
    vector = np.array([0.5, 1], np.float32)
    assert written(SENTENCES, [vector]) == [0.5, 1]
    assert written(SENTENCES, [vector], inputs=["a"]) == [[0.5, 1]]


def test_answers_to_questions() -> None:
    found, best = [Answer("Paris", 0.5, 3, 8)], {"answer": "Paris", "score": 0.5, "start": 3, "end": 8}
    assert written(QUESTIONS, [found]) == best
    assert written(QUESTIONS, [found, []], inputs=["a", "b"])[1] == {"answer": "", "score": 0, "start": 0, "end": 0}
    assert written(QUESTIONS, [found], parameters={"top_k": 1}) == best
    assert written(QUESTIONS, [found], parameters={"top_k": 2}) == [best]


def test_similarities_are_cosines() -> None:
    vectors = [np.array(one, np.float32) for one in ([1, 0], [2, 0], [0, 3], [0, 0])]
    asked = {"source_sentence": "a", "sentences": ["b", "c", "d"]}
    assert written(SENTENCES, vectors, inputs=asked) == [1, 0, 0]
