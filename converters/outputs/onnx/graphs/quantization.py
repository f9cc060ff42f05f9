"""Smaller graphs of merged models: int8 weights, with activations quantised at run time; or fp16 throughout."""

import logging
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import convert_float_to_float16

from converters.errors import ConversionError, PeanutError
from converters.outputs.onnx.graphs.model_file import SINGLE_FILE_BYTES, external_data

_ENOUGH = 0.9  # share of linear layers; with fewer, a graph is quantised in name only
_OVERFLOW = 65520  # the least number that fp16 rounds to infinity
_ONE_LINE = 300
_HEADER = ("producer_name", "producer_version", "metadata_props")


@dataclass(frozen=True)
class Quantized:
    """A quantised graph.

    Attributes:
        linears: linear layers, each a MatMul or Gemm by a weight.
        quantized: how many of them have weights in the new precision.
        nbytes: size of the graph with its external data.
    """

    linears: int
    quantized: int
    nbytes: int

    def summary(self) -> dict[str, int]:
        """For the manifest."""
        return asdict(self)


def quantize(model: Path, output: Path, precision: str) -> Quantized:
    """Write a graph in another precision. Its inputs and outputs stay float32.

    Args:
        model: a graph that `merged.write_merged` wrote.
        output: the new graph; weights that are too large for one file get their own, as in `merged`.
        precision: `int8` (a scale for each output of a linear layer, one for a table of embeddings) or `fp16`.

    Raises `ConversionError` if it cannot be converted, a weight does not fit fp16, or too few layers were quantised.
    """
    convert, wanted = _CONVERTERS[precision]
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        scratch = Path(folder)
        try:
            header, linears = _facts(model)
            with _undisturbed(scratch):
                proto = convert(model, scratch)
        except (PeanutError, OSError):
            raise
        except Exception as error:  # the libraries' exceptions have no common base
            cause = " ".join(str(error).split())[:_ONE_LINE] or type(error).__name__
            raise ConversionError(f"{model.name} cannot be converted to {precision}: {cause}") from None
        quantized = _linear_types(proto.graph).count(wanted)
        if quantized < _ENOUGH * linears:
            raise ConversionError(
                f"{model.name}: only {quantized} of {linears} linear layers became {precision}, expected "
                f"{_ENOUGH:.0%} of them"
            )
        return Quantized(linears, quantized, _save(_headed(proto, header), scratch, output))


def _facts(model: Path) -> tuple[ModelProto, int]:
    """The header of a graph, and how many linear layers it has."""
    proto = onnx.load(model, load_external_data=False)
    header = ModelProto(**{field: getattr(proto, field) for field in _HEADER})
    return header, len(_linear_types(proto.graph))


@contextmanager
def _undisturbed(scratch: Path) -> Iterator[None]:
    """Keep temporary files of the libraries out of /tmp, which may be small, and silence their logging."""
    silent, folder, handler = logging.root.manager.disable, tempfile.tempdir, logging.NullHandler()
    logging.root.addHandler(handler)  # otherwise `logging.warning` adds one that stays
    logging.disable(logging.CRITICAL)
    tempfile.tempdir = str(scratch)
    try:
        yield
    finally:
        tempfile.tempdir = folder
        logging.disable(silent)
        logging.root.removeHandler(handler)


def _to_int8(model: Path, scratch: Path) -> ModelProto:
    folded, quantized = scratch / "folded.onnx", scratch / "quantized.onnx"
    proto = onnx.load(model)
    _fold_transposes(proto.graph)
    onnx.save(proto, folded, save_as_external_data=True, location="folded.onnx_data")
    # a Gemm becomes a MatMul and an Add; Gather reads embeddings: without them MiniLM is larger than in fp16
    quantize_dynamic(
        folded, quantized, op_types_to_quantize=["MatMul", "Gather"], per_channel=True,
        weight_type=QuantType.QInt8, use_external_data_format=True,
    )  # fmt: skip
    return onnx.load(quantized)


def _fold_transposes(graph: GraphProto) -> None:
    """Store transposed what is read transposed: a MatMul is quantised only if its weight is an initializer."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    readers = _readers(graph)
    folded = {}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        name, result = node.input[0], node.output[0]
        perm = next(attribute.ints for attribute in node.attribute if attribute.name == "perm")
        transposed = np.ascontiguousarray(numpy_helper.to_array(weights[name]).transpose(perm))
        is_shared = len(readers[name]) > 1  # a tied embedding
        folded[result] = result if is_shared else name
        tensor = graph.initializer.add() if is_shared else weights[name]
        tensor.CopyFrom(numpy_helper.from_array(transposed, folded[result]))
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [folded.get(name, name) for name in node.input]


def _to_fp16(model: Path, scratch: Path) -> ModelProto:
    onnx.shape_inference.infer_shapes_path(model, scratch / "inferred.onnx")
    values = onnx.load(scratch / "inferred.onnx", load_external_data=False).graph.value_info
    proto = onnx.load(model)
    kept = _float32_nodes(proto.graph, {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT})
    _check_fits(proto.graph, kept)
    readers = _readers(proto.graph)
    inner = {
        result
        for node in proto.graph.node
        for result in node.output
        if node.name in kept and {reader.name for reader in readers[result]} <= kept
    }
    # the converter rounds all values of known type to fp16, also on their way from one float32 node to the next
    proto.graph.value_info.extend(value for value in values if value.name not in inner)
    converted: ModelProto = convert_float_to_float16(
        proto, keep_io_types=True, disable_shape_infer=True, node_block_list=kept
    )
    ONNXModel(converted).topological_sort()
    return converted


def _float32_nodes(graph: GraphProto, floats: set[str]) -> set[str]:
    """Names of the nodes that stay in float32; `floats` are the values in float32.

    Masks: the lowest float32 would become -inf, and a fully masked row NaN. Angles of rotary embeddings: above 2048,
    fp16 cannot distinguish positions. Squares in RMSNorm: the square of 256 overflows. LayerNormalization and Softmax
    can be in fp16: the logits are as close (the former computes in float32 anyway), and there are fewer casts.
    """
    angles = _nodes_before(graph, ("Cos", "Sin"), floats)
    squares = _nodes_before(graph, ("Sqrt",), floats, through=("Sqrt", "Add", "ReduceMean"))
    return _masking_nodes(graph, floats) | angles | squares


def _masking_nodes(graph: GraphProto, floats: set[str]) -> set[str]:
    """All nodes that a number too large for fp16 passes through, up to the Softmax."""
    readers = _readers(graph)
    found: set[str] = set()
    reached = [tensor.name for tensor in graph.initializer if not tensor.dims and _overflows(tensor)]
    while reached:
        for node in readers[reached.pop()]:
            if node.op_type != "Softmax" and node.name not in found:
                reached += [result for result in node.output if result in floats]
            found.add(node.name)
    return found


def _nodes_before(
    graph: GraphProto, ends: Collection[str], floats: set[str], through: Collection[str] | None = None
) -> set[str]:
    """The nodes of types `ends` and those before them: as long as these are of types `through`, and one more."""
    producers = {result: node for node in graph.node for result in node.output}
    found: set[str] = set()
    waiting = [node for node in graph.node if node.op_type in ends]
    while waiting:
        node = waiting.pop()
        if node.name not in found and (through is None or node.op_type in through):
            waiting += [producers[name] for name in node.input if name in floats]
        found.add(node.name)
    return found


def _check_fits(graph: GraphProto, kept: set[str]) -> None:
    readers = _readers(graph)
    for tensor in graph.initializer:
        if not {node.name for node in readers[tensor.name]} <= kept and _overflows(tensor):
            largest = np.abs(numpy_helper.to_array(tensor)).max()
            raise ConversionError(
                f"{tensor.name} has a weight of {largest:.6g}, but fp16 ends at 65504; use int8 or float32"
            )


def _overflows(tensor: TensorProto) -> bool:
    return tensor.data_type == TensorProto.FLOAT and bool((np.abs(numpy_helper.to_array(tensor)) >= _OVERFLOW).any())


def _linear_types(graph: GraphProto) -> list[int]:
    """The data type of the weight of every linear layer."""
    types: dict[str, int] = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in types:
            types[node.output[0]] = types[node.input[0]]
    linears = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "MatMulInteger")]
    return [types[node.input[1]] for node in linears if node.input[1] in types]


def _readers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    readers = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    return readers


def _headed(proto: ModelProto, header: ModelProto) -> ModelProto:
    """With the header it had: a library has put its own name there."""
    for field in _HEADER:
        proto.ClearField(field)
    proto.MergeFrom(header)
    del proto.graph.value_info[:]
    return proto


def _save(proto: ModelProto, scratch: Path, output: Path) -> int:
    """Write a graph; returns its bytes."""
    draft = scratch / output.name
    data = external_data(draft)
    is_large = sum(tensor.ByteSize() for tensor in proto.graph.initializer) > SINGLE_FILE_BYTES
    onnx.save(proto, draft, save_as_external_data=is_large, location=data.name)
    written = [data, draft] if is_large else [draft]
    nbytes = sum(path.stat().st_size for path in written)
    for path in written:
        path.replace(output.with_name(path.name))
    return nbytes


_CONVERTERS: dict[str, tuple[Callable[[Path, Path], ModelProto], int]] = {
    "int8": (_to_int8, TensorProto.INT8),
    "fp16": (_to_fp16, TensorProto.FLOAT16),
}
