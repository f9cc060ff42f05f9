"""Graphs on the disk, without a second copy of their weights in memory.

A protobuf message is a sequence of fields, each preceded by its number and length
(https://protobuf.dev/programming-guides/encoding), so the numbers of a weight go from its tensor into the file.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import torch
from onnx import GraphProto, ModelProto, TensorProto
from torch import Tensor

from converters.outputs.onnx.graphs.weights_file import WeightsFile, raw_bytes

# protobuf's limit is 2 GiB; everything but the weights takes a few MB
SINGLE_FILE_BYTES = 2_000_000_000
_LENGTH_DELIMITED = 2  # wire type


def external_data(model: Path) -> Path:
    """The file beside a graph that holds its weights."""
    return model.with_name(f"{model.name}_data")


def declared(name: str, tensor: Tensor) -> TensorProto:
    """An initializer whose numbers `save_model` writes."""
    return TensorProto(name=name, dims=tensor.shape, data_type=TensorProto.FLOAT)


def save_model(model: Path, proto: ModelProto, weights: Mapping[str, Tensor]) -> None:
    """Write a graph: a single file, or a graph with a file of weights if they are too large for one.

    Args:
        model: the .onnx file.
        proto: the graph. If the weights get a file of their own, it refers to them afterwards.
        weights: the numbers of its `declared` initializers, float32.
    """
    if sum(tensor.nbytes for tensor in weights.values()) <= SINGLE_FILE_BYTES:
        with model.open("xb") as file:
            for chunk in _chunks(proto, weights):
                file.write(chunk)
        return
    with WeightsFile(external_data(model)) as data:
        for initializer in proto.graph.initializer:
            if initializer.name in weights:
                initializer.CopyFrom(data.add(initializer.name, weights[initializer.name]))
    onnx.save(proto, model)


def _chunks(proto: ModelProto, weights: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a model, its graph last in it, and the initializers last in that."""
    shell, graph = ModelProto(), GraphProto()
    shell.CopyFrom(proto)
    shell.ClearField("graph")
    graph.CopyFrom(proto.graph)
    graph.ClearField("initializer")
    rest, initializers = graph.SerializeToString(), []
    for initializer in proto.graph.initializer:
        message, tensor = initializer.SerializeToString(), weights.get(initializer.name, torch.empty(0))
        if tensor.nbytes:
            message += _field(TensorProto.RAW_DATA_FIELD_NUMBER, tensor.nbytes)
        head = _field(GraphProto.INITIALIZER_FIELD_NUMBER, len(message) + tensor.nbytes)
        initializers.append((head + message, tensor))
    size = len(rest) + sum(len(head) + tensor.nbytes for head, tensor in initializers)
    yield shell.SerializeToString() + _field(ModelProto.GRAPH_FIELD_NUMBER, size) + rest
    for head, tensor in initializers:
        yield head
        yield raw_bytes(tensor)


def _field(number: int, length: int) -> bytes:
    """The tag and length that precede the bytes of a field."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first; the eighth bit is set if another byte follows."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
