"""Tensors of the Open Inference Protocol: what is read, what is written, and what is refused with a sentence."""

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peanut_serve.classify.http.tensors import read_request, write_response
from peanut_serve.errors import RequestBodyError

IDS = {"name": "input_ids", "shape": [2, 2], "datatype": "INT64", "data": [[1, 2], [3, 4]]}
TEXT = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["good", "bäd"]}


def body(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def binary(tensor: dict[str, Any], content: bytes, tail: bytes = b"") -> tuple[bytes, str]:
    own = {key: value for key, value in tensor.items() if key != "data"}
    head = body({**own, "parameters": {"binary_data_size": len(content)}})
    return head + content + tail, str(len(head))


def test_numbers_in_json_nested_and_flat() -> None:
    for data in ([[1, 2], [3, 4]], [1, 2, 3, 4]):
        found = read_request(body({**IDS, "data": data}, id="7"), None, images=False)
        assert found.id == "7"
        np.testing.assert_array_equal(found.tensors["input_ids"], [[1, 2], [3, 4]])
        assert found.tensors["input_ids"].dtype == np.int64


def test_numbers_in_binary() -> None:
    pixels = np.arange(6, dtype=np.float32).reshape(1, 6)
    tensor = {"name": "pixel_values", "shape": [1, 6], "datatype": "FP32"}
    found = read_request(*binary(tensor, pixels.tobytes()), images=True)
    np.testing.assert_array_equal(found.tensors["pixel_values"], pixels)


def test_bytes_are_texts_or_images() -> None:
    assert read_request(body(TEXT), None, images=False).tensors["text"] == [b"good", "bäd".encode()]
    packed = b"".join(struct.pack("<I", len(one)) + one for one in (b"\x00\xff", b""))
    image = {"name": "image", "shape": [2], "datatype": "BYTES"}
    assert read_request(*binary(image, packed), images=True).tensors["image"] == [b"\x00\xff", b""]
    found = read_request(body({**image, "shape": [1], "data": ["AP8="]}), None, images=True)
    assert found.tensors["image"] == [b"\x00\xff"]


REFUSED = {
    "not valid JSON": (b"{", None),
    "not a JSON object": (b"[]", None),
    "inputs is not a list": (b"{}", None),
    "inputs is empty": (body(), None),
    "sequence_id is not supported": (body(IDS, parameters={"sequence_id": 1}), None),
    "model is not supported": (body(IDS, model="x"), None),
    "shared_memory_region is not supported": (body({**IDS, "parameters": {"shared_memory_region": "x"}}), None),
    "is there twice": (body(IDS, IDS), None),
    "a tensor has no name": (body({**IDS, "name": 3}), None),
    "the shape of input_ids is not": (body({**IDS, "shape": [2, -2]}), None),
    "the shape of input_ids is not a": (body({**IDS, "shape": [True]}), None),
    "the shape of input_ids is not a list": (body({**IDS, "shape": [1] * 9}), None),
    "the datatype of input_ids is FP64": (body({**IDS, "datatype": "FP64"}), None),
    "has 4 elements, its shape": (body({**IDS, "shape": [1 << 40]}), None),
    "has elements that are not INT64": (body({**IDS, "data": [1, 2, 3, 4.5]}), None),
    "has elements that are not INT64 ": (body({**IDS, "data": [1, 2, 3, True]}), None),
    "too large for INT64": (body({**IDS, "data": [1, 2, 3, 1 << 70]}), None),
    "an element that is not a string": (body({**TEXT, "data": ["a", 1]}), None),
    "is -1, expected a number of bytes": (body(IDS), "-1"),
    "is 9999, expected a number of bytes": (body(IDS), "9999"),
    "only 3 bytes are left": (binary({**IDS}, b"x" * 32)[0][:-29], binary({**IDS}, b"x" * 32)[1]),
    "which is not INT64": binary(IDS, b"x" * 8),
    "5 bytes are left": binary(IDS, b"x" * 32, b"12345"),
    "elements of BYTES, each after its length": binary(TEXT, struct.pack("<I", 1 << 31) + b"x"),
    "both data and binary_data_size": (body({**IDS, "parameters": {"binary_data_size": 0}}), None),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_the_protocol_is_refused(said: str) -> None:
    with pytest.raises(RequestBodyError, match=said.strip()):
        read_request(*REFUSED[said], images=False)


@pytest.mark.parametrize("given_image", ["/etc/passwd", "http://127.0.0.1/x.png", "file:///etc/passwd", "not base64"])
def test_an_image_is_never_a_path_or_url(given_image: str) -> None:
    image = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [given_image]}
    with pytest.raises(RequestBodyError, match="paths and URLs are never opened"):
        read_request(body(image), None, images=True)


def test_deep_nesting_is_refused() -> None:
    deep = (
        b'{"inputs": [{"name": "x", "shape": [1], "datatype": "INT64", "data": ' + b"[" * 5000 + b"]" * 5000 + b"}]}"
    )
    with pytest.raises(RequestBodyError):
        read_request(deep, None, images=False)


@given(st.binary(max_size=200), st.sampled_from([None, "0", "3", "50", "x", "²"]), st.booleans())
def test_any_bytes_are_read_or_refused(content: bytes, header: str | None, images: bool) -> None:
    for whole in (content, body(TEXT) + content, body(IDS)[: len(content)] + content):
        try:
            read_request(whole, header, images)
        except RequestBodyError:
            continue


def test_a_response_is_json_or_binary_as_each_output_says() -> None:
    logits = np.array([[0.5, 1.5]], np.float32)
    tensors = {"logits": logits, "lengths": np.array([4], np.int64), "best": [b"1.5:1:good"]}
    shapes = {"logits": (1, 2), "lengths": (1,), "best": (1, 1)}
    written, end = write_response({"model_name": "mood"}, tensors, shapes, dict.fromkeys(tensors, False))
    assert end is None
    outputs = json.loads(written)["outputs"]
    assert [one["datatype"] for one in outputs] == ["FP32", "INT64", "BYTES"]
    assert [one["data"] for one in outputs] == [[0.5, 1.5], [4], ["1.5:1:good"]]
    written, end = write_response({}, tensors, shapes, {"logits": True, "lengths": False, "best": True})
    assert end is not None
    sizes = [one.get("parameters", {}).get("binary_data_size") for one in json.loads(written[:end])["outputs"]]
    assert sizes == [8, None, 14]
    assert written[end:] == logits.tobytes() + struct.pack("<I", 10) + b"1.5:1:good"
