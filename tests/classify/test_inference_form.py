"""Requests and answers in the form of Hugging Face's inference API: what is read of a body, and what is refused."""

import base64
import io
import json
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from converters.inference.kinds import ModelKind
from peanut_serve.classify.inference_form import Asked, answer, read_request
from peanut_serve.errors import RequestBodyError, RequestTooLargeError, ServingError

JSON = "application/json"
IMAGES = ModelKind("image-classification", ("pixel_values",), ("logits",))
SOUNDS = ModelKind("audio-classification", ("input_values",), ("logits",), takes_waves=True)
_WORDS = ("input_ids", "attention_mask")
TEXTS = ModelKind("text-classification", _WORDS, ("logits",))
TOKENS = ModelKind("token-classification", _WORDS, ("logits",))
QUESTIONS = ModelKind("question-answering", _WORDS, ("start_logits", "end_logits"))
SENTENCES = ModelKind("sentence-similarity", _WORDS, ("sentence_embedding",))


def png(width: int = 2, height: int = 3) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def wide_png(width: int, height: int) -> bytes:
    """A file whose header says that it is large: nothing more of it may be needed to refuse it."""
    small = png()
    header = b"IHDR" + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def wav(seconds: int, rate: int = 100) -> bytes:
    data = bytes(seconds * rate)
    form = struct.pack("<HHIIHH", 1, 1, rate, rate, 1, 8)
    return b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data)) + data


def read(kind: ModelKind, value: Any) -> Asked:
    return read_request(kind, JSON, json.dumps(value).encode())


def test_files_are_sent_as_they_are_or_in_base64() -> None:
    image = png()
    encoded = base64.b64encode(image).decode()
    assert read_request(IMAGES, "image/png", image) == Asked((image,))
    assert read_request(IMAGES, "", image) == Asked((image,))
    assert read(IMAGES, {"inputs": encoded, "parameters": {"top_k": 2}}) == Asked((image,), top_k=2)
    assert read(IMAGES, {"inputs": [encoded] * 2}) == Asked((image, image), several=True)
    assert read_request(SOUNDS, "audio/wav", wav(60)).examples == (wav(60),)


def test_texts() -> None:
    assert read_request(TEXTS, "", b'{"inputs": "a"}') == Asked(("a",))
    assert read(TEXTS, {"inputs": ["a", {"text": "b", "text_pair": "c"}]}).examples == ("a", ("b", "c"))
    assert read(QUESTIONS, {"inputs": {"question": "q", "context": "c"}}) == Asked((("q", "c"),), top_k=1)
    usual = {"aggregation_strategy": "simple", "stride": None}
    assert read(TOKENS, {"inputs": "a", "parameters": usual}) == Asked(("a",))
    assert read(SENTENCES, {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}}) == Asked(
        ("a", "b", "c"), compares=True
    )


@pytest.mark.parametrize(
    ("kind", "value", "error", "told"),
    [
        (TEXTS, [], RequestBodyError, "no inputs"),
        (TEXTS, {"inputs": "a", "options": {}}, RequestBodyError, "unknown field options"),
        (TEXTS, {"inputs": 3}, RequestBodyError, "JSON int"),
        (TEXTS, {"inputs": []}, RequestTooLargeError, "0 inputs"),
        (TEXTS, {"inputs": ["a"] * 65}, RequestTooLargeError, "65 inputs"),
        (TEXTS, {"inputs": "a" * 100_001}, RequestTooLargeError, "100001 characters"),
        (TEXTS, {"inputs": "\ud800"}, RequestBodyError, "surrogate"),
        (TEXTS, {"inputs": {"text": "a", "text_pair": 1}}, RequestBodyError, "text_pair"),
        (TEXTS, {"inputs": {"text": "a"}}, RequestBodyError, "text_pair"),
        (TEXTS, {"inputs": "a", "parameters": []}, RequestBodyError, "parameters is a JSON list"),
        (TEXTS, {"inputs": "a", "parameters": {"function_to_apply": "none"}}, RequestBodyError, "function_to_apply"),
        (TEXTS, {"inputs": "a", "parameters": {"top_k": 0}}, RequestBodyError, "top_k is 0"),
        (TEXTS, {"inputs": "a", "parameters": {"top_k": True}}, RequestBodyError, "top_k is True"),
        (TOKENS, {"inputs": "a", "parameters": {"aggregation_strategy": "max"}}, RequestBodyError, "aggregation"),
        (TOKENS, {"inputs": "a", "parameters": {"top_k": 1}}, RequestBodyError, "top_k"),
        (QUESTIONS, {"inputs": "a"}, RequestBodyError, "question and context"),
        (SENTENCES, {"inputs": {"source_sentence": "a"}}, RequestBodyError, "source_sentence and sentences"),
        (SENTENCES, {"inputs": {"source_sentence": "a", "sentences": ["b"] * 64}}, RequestTooLargeError, "64"),
        (IMAGES, {"inputs": "/etc/passwd"}, RequestBodyError, "not opened"),
        (IMAGES, {"inputs": "http://127.0.0.1/cat.png"}, RequestBodyError, "not opened"),
        (IMAGES, {"inputs": 1}, RequestBodyError, "base64"),
        (IMAGES, {"inputs": "aGVsbG8="}, RequestBodyError, "cannot be read as an image"),
    ],
)
def test_what_is_refused(kind: ModelKind, value: Any, error: type[ServingError], told: str) -> None:
    with pytest.raises(error, match=told):
        read(kind, value)


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b'"\xff"'])
def test_bodies_that_are_not_json(body: bytes) -> None:
    with pytest.raises(RequestBodyError, match="not valid JSON"):
        read_request(TEXTS, JSON, body)


def test_files_that_are_too_large_are_not_decoded() -> None:
    with pytest.raises(RequestTooLargeError, match="40010000 pixels"):
        read_request(IMAGES, "image/png", wide_png(4001, 10_000))
    with pytest.raises(RequestBodyError, match="cannot be read as an image .DecompressionBomb"):
        read_request(IMAGES, "image/png", wide_png(100_000, 100_000))
    with pytest.raises(RequestTooLargeError, match="61 seconds"):
        read_request(SOUNDS, "audio/wav", wav(61))
    with pytest.raises(RequestBodyError, match="not a WAV file"):
        read_request(SOUNDS, "audio/wav", png())


def test_answers_have_the_shape_that_clients_expect() -> None:
    found = [[{"label": str(index), "score": 0.1} for index in range(9)]]
    assert len(answer(IMAGES, Asked((b"",)), found)) == 5
    assert answer(IMAGES, Asked((b"",), several=True, top_k=2), found) == [found[0][:2]]
    assert answer(TEXTS, Asked(("a",), top_k=1), found) == [found[0][:1]], "a list in a list, also for one text"
    assert answer(TOKENS, Asked(("a",)), found) == found[0]
    spans = [[{"answer": "b", "score": 0.5, "start": 0, "end": 1}] * 2]
    assert answer(QUESTIONS, Asked((("a", "b"),), top_k=1), spans) == spans[0][0]
    assert answer(QUESTIONS, Asked((("a", "b"),), top_k=2), spans) == spans[0]
    assert answer(QUESTIONS, Asked((("a", ""),), top_k=1), [[]])["answer"] == ""
    assert answer(SENTENCES, Asked(("a",)), [[1.0, 0.0]]) == [1.0, 0.0]
    compared = answer(SENTENCES, Asked(("a", "b", "c"), compares=True), [[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    assert compared == [1.0, 0.0]
