"""Tensors of the Open Inference Protocol: JSON, and the binary extension of Triton.

A binary tensor follows the JSON in the body, in the order of the tensors, little-endian and row by row; an element of
BYTES is its length in 4 bytes and its content. The header `Inference-Header-Content-Length` says where the JSON ends.
"""

import base64
import binascii
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peanut_serve.errors import RequestBodyError, shown

HEADER = "inference-header-content-length"
_TYPES: dict[str, "np.dtype[Any]"] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Request:
    """A request for inference.

    Attributes:
        id: chosen by the client.
        tensors: name -> numbers, or the elements of BYTES in one dimension.
        outputs: name -> parameters, of the outputs that are wanted; empty for all.
        is_binary: whether outputs are binary unless they say otherwise.
    """

    id: str | None
    tensors: Mapping[str, NDArray[Any] | list[bytes]]
    outputs: Mapping[str, Mapping[str, Any]]
    is_binary: bool


def read_request(body: bytes, header: str | None, images: bool) -> Request:
    """Read a request. `images` says whether BYTES in JSON are images in base64, rather than texts.

    Raises `RequestBodyError` if the body does not follow the protocol, or asks for what is not supported.
    """
    end = len(body)
    if header is not None:
        if not header.isascii() or not header.isdigit() or int(header) > len(body):
            raise RequestBodyError(f"{HEADER} is {shown(header)}, expected a number of bytes up to {len(body)}")
        end = int(header)
    try:
        value = json.loads(body[:end])
    except (ValueError, RecursionError):
        raise RequestBodyError("the request is not valid JSON") from None
    value = _object(value, "the request", ("id", "inputs", "outputs", "parameters"))
    binary = _Binary(body, end)
    tensors: dict[str, NDArray[Any] | list[bytes]] = {}
    for one in _list(value.get("inputs"), "inputs"):
        name, found = _tensor(one, binary, images)
        if name in tensors:
            raise RequestBodyError(f"the input {shown(name)} is there twice")
        tensors[name] = found
    if not tensors:
        raise RequestBodyError("inputs is empty, expected one tensor or more")
    binary.check_end()
    outputs = {}
    for one in _list(value.get("outputs", []), "outputs"):
        wanted = _object(one, "an output", ("name", "parameters"))
        own = _object(wanted.get("parameters") or {}, "its parameters", ("binary_data", "classification"))
        outputs[_name(wanted)] = own
    own = _object(value.get("parameters") or {}, "parameters", ("binary_data_output",))
    if value.get("id") is not None and not isinstance(value["id"], str):
        raise RequestBodyError("id is not a string")
    return Request(value.get("id"), tensors, outputs, own.get("binary_data_output") is True)


class _Binary:
    """The part of a body after the JSON."""

    def __init__(self, body: bytes, start: int) -> None:
        self._body, self._place = body, start

    def take(self, size: int) -> memoryview:
        """The next bytes."""
        if self._place + size > len(self._body):
            raise RequestBodyError(
                f"binary_data_size is {size}, but only {len(self._body) - self._place} bytes are left"
            )
        self._place += size
        return memoryview(self._body)[self._place - size : self._place]

    def check_end(self) -> None:
        """Raise `RequestBodyError` if bytes are left."""
        if self._place != len(self._body):
            raise RequestBodyError(f"{len(self._body) - self._place} bytes are left after all inputs")


def _tensor(given: Any, binary: _Binary, images: bool) -> tuple[str, NDArray[Any] | list[bytes]]:
    value = _object(given, "an input", ("name", "shape", "datatype", "parameters", "data"))
    name, shape, datatype = _name(value), value.get("shape"), value.get("datatype")
    own = _object(value.get("parameters") or {}, f"the parameters of {shown(name)}", ("binary_data_size",))
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= _MOST_DIMENSIONS
        or any(type(size) is not int or size < 0 for size in shape)
    ):
        raise RequestBodyError(f"the shape of {shown(name)} is not a list of 1 to {_MOST_DIMENSIONS} numbers")
    if datatype != "BYTES" and (not isinstance(datatype, str) or datatype not in _TYPES):
        raise RequestBodyError(
            f"the datatype of {shown(name)} is {shown(str(datatype))}; expected BYTES, {' or '.join(_TYPES)}"
        )
    count = math.prod(shape)
    size = own.get("binary_data_size")
    if size is not None:
        if type(size) is not int or size < 0 or "data" in value:
            raise RequestBodyError(f"{shown(name)} has both data and binary_data_size, or one that is not a size")
        raw = binary.take(size)
        if datatype == "BYTES":
            return name, _elements(raw, count, name)
        if size != count * _TYPES[datatype].itemsize:
            raise RequestBodyError(f"{shown(name)} has {size} bytes, which is not {datatype}{shape}")
        return name, np.frombuffer(raw, _TYPES[datatype]).reshape(shape)
    return name, _from_json(value.get("data"), shape, datatype, name, images)


def _elements(raw: memoryview, count: int, name: str) -> list[bytes]:
    found, place = [], 0
    while place + 4 <= len(raw):
        (size,) = struct.unpack_from("<I", raw, place)
        found.append(bytes(raw[place + 4 : place + 4 + size]))
        place += 4 + size
    if place != len(raw) or len(found) != count:
        raise RequestBodyError(f"{shown(name)} does not have {count} elements of BYTES, each after its length")
    return found


def _from_json(data: Any, shape: Sequence[int], datatype: str, name: str, images: bool) -> NDArray[Any] | list[bytes]:
    flat = _flat(_list(data, f"the data of {shown(name)}"))
    if len(flat) != math.prod(shape):
        raise RequestBodyError(
            f"{shown(name)} has {len(flat)} elements, its shape {list(shape)} has {math.prod(shape)}"
        )
    if datatype == "BYTES":
        return [_bytes(one, name, images) for one in flat]
    allowed: Any = (int,) if datatype == "INT64" else (int, float)
    if not all(type(one) in allowed for one in flat):
        raise RequestBodyError(f"{shown(name)} has elements that are not {datatype}")
    try:
        found: NDArray[Any] = np.array(flat, _TYPES[datatype]).reshape(shape)
    except OverflowError:
        raise RequestBodyError(f"{shown(name)} has a number that is too large for {datatype}") from None
    return found


def _flat(data: list[Any]) -> list[Any]:
    """The elements of nested lists, in order; nesting is limited, since JSON's is not."""
    for _ in range(_MOST_DIMENSIONS):
        if not any(isinstance(one, list) for one in data):
            break
        data = [one for part in data for one in (part if isinstance(part, list) else [part])]
    return data


def _bytes(given: Any, name: str, images: bool) -> bytes:
    if not isinstance(given, str):
        raise RequestBodyError(f"{shown(name)} has an element that is not a string")
    if not images:
        return given.encode("utf-8", "surrogatepass")
    try:
        return base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError):
        raise RequestBodyError(f"an image in {shown(name)} is not base64; paths and URLs are never opened") from None


def _object(value: Any, what: str, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestBodyError(f"{what} is not a JSON object")
    if unknown := sorted(value.keys() - set(keys)):
        raise RequestBodyError(f"{what}: {shown(unknown[0])} is not supported; supported: {', '.join(keys)}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestBodyError(f"{what} is not a list")
    return value


def _name(value: Mapping[str, Any]) -> str:
    if not isinstance(value.get("name"), str):
        raise RequestBodyError("a tensor has no name")
    return str(value["name"])


def write_response(
    facts: Mapping[str, Any], outputs: Mapping[str, NDArray[Any] | list[bytes]], shapes: Mapping[str, Sequence[int]],
    is_binary: Mapping[str, bool],
) -> tuple[bytes, int | None]:  # fmt: skip
    """The body of a response, and where its JSON ends if binary tensors follow it."""
    described, parts = [], []
    for name, tensor in outputs.items():
        datatype = "BYTES" if isinstance(tensor, list) else {"f": "FP32", "i": "INT64"}[tensor.dtype.kind]
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(shapes[name])}
        if is_binary[name]:
            parts.append(_packed(tensor))
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = [one.decode() for one in tensor] if isinstance(tensor, list) else tensor.ravel().tolist()
        described.append(entry)
    head = json.dumps({**facts, "outputs": described}).encode()
    return (head + b"".join(parts), len(head)) if parts else (head, None)


def _packed(tensor: NDArray[Any] | list[bytes]) -> bytes:
    if isinstance(tensor, list):
        return b"".join(struct.pack("<I", len(one)) + one for one in tensor)
    packed: bytes = np.ascontiguousarray(tensor, _TYPES["FP32" if tensor.dtype.kind == "f" else "INT64"]).tobytes()
    return packed
