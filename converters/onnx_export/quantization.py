"""Smaller graphs of merged models: weights in int8, activations quantised as they come; or everything in fp16."""

import logging
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from converters.errors import ConversionError, PeanutError
from converters.onnx_export.merged import SINGLE_FILE_BYTES, external_data

_ENOUGH = 0.9  # share of the linear layers below which a graph is float32 in all but name
_FP16_OVERFLOW = 65520  # what is as large becomes infinite
_ONE_LINE = 300

# what cannot be computed in fp16, and what should not: normalisation (RMSNorm is traced into its steps), whose squares
# overflow; Pow is GELU's cube, too
_FLOAT32_OPS = {*DEFAULT_OP_BLOCK_LIST, "LayerNormalization", "Softmax", "Pow", "ReduceMean", "Sqrt", "Reciprocal"}


@dataclass(frozen=True)
class Quantized:
    """What became of a graph.

    Attributes:
        linears: linear layers, each a MatMul or Gemm by a weight.
        quantized: how many of them have weights in the new precision.
        nbytes: size of the graph with its external data.
    """

    linears: int
    quantized: int
    nbytes: int

    def summary(self) -> dict[str, int]:
        """As the manifest has it."""
        return asdict(self)


def quantize(model: Path, output: Path, precision: str) -> Quantized:
    """Write a graph in another precision. Its inputs and outputs stay as they are.

    Args:
        model: a graph that `merged.write_merged` wrote, in float32.
        output: the new graph; weights that are too large for one file come beside it, as in `merged`.
        precision: `int8` (dynamic, a scale for each output of a layer) or `fp16`.

    Raises `ConversionError` if it cannot be converted, a weight does not fit fp16, or too few layers were quantised.
    """
    convert, wanted = _CONVERTERS[precision]
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        scratch = Path(folder)
        try:
            original = onnx.load(model)
            linears = len(_linear_types(original.graph))
            metadata = {entry.key: entry.value for entry in original.metadata_props}
            with _undisturbed(scratch):
                proto = convert(original, scratch)
        except (PeanutError, OSError):
            raise
        except Exception as error:  # the libraries' exceptions have no common base
            cause = " ".join(str(error).split())[:_ONE_LINE] or type(error).__name__
            raise ConversionError(f"{model.name} cannot be converted to {precision}: {cause}") from None
        quantized = _linear_types(proto.graph).count(wanted)
        if quantized < _ENOUGH * linears:
            raise ConversionError(
                f"{model.name}: only {quantized} of {linears} linear layers became {precision}, wanted "
                f"{_ENOUGH:.0%} of them"
            )
        return Quantized(linears, quantized, _save(proto, metadata, scratch, output))


@contextmanager
def _undisturbed(scratch: Path) -> Iterator[None]:
    """Keeps what the libraries write out of /tmp, which may be small, and what they log off the screen."""
    silent, handler, root = logging.root.manager.disable, logging.NullHandler(), logging.getLogger()
    root.addHandler(handler)  # else `logging.warning` adds one that stays
    logging.disable(logging.CRITICAL)
    folder, tempfile.tempdir = tempfile.tempdir, str(scratch)
    try:
        yield
    finally:
        tempfile.tempdir = folder
        logging.disable(silent)
        root.removeHandler(handler)


def _to_int8(original: ModelProto, scratch: Path) -> ModelProto:
    folded, quantized = scratch / "folded.onnx", scratch / "quantized.onnx"
    _fold_transposes(original.graph)
    onnx.save(original, folded, save_as_external_data=True, location="folded.onnx_data")
    # a Gemm becomes a MatMul and an Add by itself
    quantize_dynamic(
        folded, quantized, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8,
        use_external_data_format=True,
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


def _to_fp16(original: ModelProto, scratch: Path) -> ModelProto:
    graph = original.graph
    onnx.save(original, scratch / "original.onnx", save_as_external_data=True, location="original.onnx_data")
    onnx.shape_inference.infer_shapes_path(scratch / "original.onnx", scratch / "inferred.onnx")
    onnx.load_external_data_for_model(original, str(scratch))
    inferred = onnx.load(scratch / "inferred.onnx", load_external_data=False).graph.value_info
    kept = _float32_nodes(graph, {v.name for v in inferred if v.type.tensor_type.elem_type == TensorProto.FLOAT})
    _check_fits(graph, kept)
    readers = _readers(graph)
    inner = {
        result
        for node in graph.node
        for result in node.output
        if node.name in kept and {reader.name for reader in readers[result]} <= kept
    }
    # what it knows the type of it rounds, also on the way from one float32 node to the next
    graph.value_info.extend(value for value in inferred if value.name not in inner)
    converted: ModelProto = convert_float_to_float16(
        original, keep_io_types=True, disable_shape_infer=True, op_block_list=[], node_block_list=kept
    )
    ONNXModel(converted).topological_sort()
    return converted


def _float32_nodes(graph: GraphProto, floats: set[str]) -> set[str]:
    """Names of the nodes that are not for fp16: `_FLOAT32_OPS`, and all around numbers it cannot say.

    Those are masks, which hold the least float32, from there to the Softmax; and the angles of rotary embeddings, at
    which positions of some thousands are rounded to integers.
    """
    readers, producers = _readers(graph), {result: node for node in graph.node for result in node.output}
    kept = {node.name for node in graph.node if node.op_type in _FLOAT32_OPS}
    masks = [t.name for t in graph.initializer if not t.dims and t.data_type == TensorProto.FLOAT and _overflows(t)]
    while masks:
        for node in readers[masks.pop()]:
            if node.op_type != "Softmax" and node.name not in kept:
                masks += [result for result in node.output if result in floats]
            kept.add(node.name)
    angles = [node.input[0] for node in graph.node if node.op_type in ("Cos", "Sin")]
    kept |= {node.name for node in graph.node if node.op_type in ("Cos", "Sin")}
    while angles:
        node = producers.get(angles.pop())
        if node is not None and node.name not in kept:
            kept.add(node.name)
            angles += [name for name in node.input if name in floats]
    return kept


def _check_fits(graph: GraphProto, kept: set[str]) -> None:
    readers = _readers(graph)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and _overflows(tensor):
            if any(node.name not in kept for node in readers[tensor.name]):
                largest = float(np.abs(numpy_helper.to_array(tensor)).max())
                raise ConversionError(
                    f"{tensor.name} has a weight of {largest:.6g}, and fp16 ends at 65504; export it as int8 or float32"
                )


def _overflows(tensor: TensorProto) -> bool:
    values = numpy_helper.to_array(tensor)
    return values.size > 0 and float(max(values.max(), -values.min())) >= _FP16_OVERFLOW


def _linear_types(graph: GraphProto) -> list[int]:
    """Data type of the weight of every linear layer."""
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


def _save(proto: ModelProto, metadata: dict[str, str], scratch: Path, output: Path) -> int:
    """Write what is said of the model as it was, the rest as it is; returns the bytes written."""
    from converters._version import __version__

    onnx.helper.set_model_props(proto, metadata)
    proto.producer_name, proto.producer_version = "peanut-serve", __version__
    del proto.graph.value_info[:]
    draft = scratch / output.name
    data = external_data(draft)
    if sum(tensor.ByteSize() for tensor in proto.graph.initializer) <= SINGLE_FILE_BYTES:
        onnx.save(proto, draft)
    else:
        onnx.save(proto, draft, save_as_external_data=True, location=data.name)
    written = [path for path in (draft, data) if path.is_file()]
    nbytes = sum(path.stat().st_size for path in written)
    for path in written:
        path.replace(output.with_name(path.name))
    return nbytes


_CONVERTERS: dict[str, tuple[Callable[[ModelProto, Path], ModelProto], int]] = {
    "int8": (_to_int8, TensorProto.INT8),
    "fp16": (_to_fp16, TensorProto.FLOAT16),
}
