"""A graph whose weights are inputs. So one trace serves every task of a base."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from logging import CRITICAL, disable
from typing import Any

import onnx
import onnx_ir
import torch
from onnx import ModelProto, TensorProto
from onnx.helper import make_tensor_value_info
from onnxscript import optimizer
from torch import Tensor

from converters._version import __version__
from converters.errors import ConversionError
from converters.inference.kinds import ModelKind
from converters.outputs.onnx.graphs.reference import Reference

_WRAPPED = "model."  # before every name in a trace: `Reference.model`
_AXES = ("batch_size", "sequence_length")
_FRAMES = ("batch_size", "frame_count")  # of outputs for sounds, whose inputs are sequences of samples


@dataclass(frozen=True, eq=False)
class Template:
    """A traced graph.

    Attributes:
        proto: a complete ONNX model; its inputs are those of the kind, then every weight in float32.
        kind: what it computes.
    """

    proto: ModelProto
    kind: ModelKind

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight -> its shape in the trace."""
        return {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in self.proto.graph.input
            if value.name not in self.kind.inputs
        }


def trace(reference: Reference, opset: int) -> Template:
    """Trace a model. Weights keep the names they have in transformers, linear ones the shape (out, in).

    Raises `ConversionError` when the tracer cannot follow it.
    """
    kind, weights = reference.kind, {_WRAPPED + name for name in reference.weights()}
    inputs = tuple(reference.random_inputs()[1].values())
    proto = trace_module(
        reference, inputs, kind.inputs, kind.outputs, opset, dynamic_shapes=_dynamic_shapes(kind), weights=weights
    )
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name in (*kind.inputs, *kind.outputs):
            axes = _FRAMES if kind.takes_waves and value.name in kind.outputs else _AXES
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.dim_param:
                    dim.dim_param = axes[axis]
    return Template(proto, kind)


def trace_module(
    module: torch.nn.Module,
    inputs: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int,
    dynamic_shapes: tuple[Any, ...] | None = None,
    weights: Collection[str] = (),
) -> ModelProto:
    """The graph of a module, constants folded. Its `weights` become inputs, named without the leading `model.`.

    Raises `ConversionError` when the tracer cannot follow it.
    """
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                module, inputs, dynamo=True, optimize=False, opset_version=opset, verbose=False,
                input_names=list(input_names), output_names=list(output_names), dynamic_shapes=dynamic_shapes,
            )  # fmt: skip
    except Exception as error:  # the tracer runs the model's own code
        first = error.__cause__ or error  # torch wraps it in a page of advice
        cause = (str(first).splitlines() or [type(first).__name__])[0]
        raise ConversionError(f"torch {torch.__version__} cannot trace this model: {cause}") from None
    graph = program.model.graph
    for name in [name for name in graph.initializers if name in weights]:
        value = graph.initializers.pop(name)
        value.const_value = None
        if value.uses():
            graph.inputs.append(value)
            value.name = name.removeprefix(_WRAPPED)
    optimizer.optimize(program.model)  # no longer touches the weights
    return _cleaned(onnx_ir.to_proto(program.model))


def _dynamic_shapes(kind: ModelKind) -> tuple[tuple[dict[int, object], ...]]:
    dynamic = torch.export.Dim.DYNAMIC
    axes: dict[int, object] = {} if kind.single else {0: dynamic}
    if kind.takes_waves or not kind.takes_files:
        axes[1] = dynamic
    return (tuple(axes for _ in kind.inputs),)  # of forward's *inputs


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracers, which write to every channel."""
    disable(CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        disable(0)


def _cleaned(proto: ModelProto) -> ModelProto:
    """Without the paths and stack traces that tracers leave."""
    graph = proto.graph
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.input, *graph.output, *graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    for holder in (graph, proto):
        del holder.metadata_props[:]
        holder.doc_string = ""
    del graph.value_info[:]
    graph.name = "peanut"
    proto.producer_name, proto.producer_version = "peanut-serve", __version__
    return proto


def bind(
    template: Template,
    initializer: Callable[[str], TensorProto],
    *,
    labels: int | None,
    metadata: Mapping[str, str],
    overridable: frozenset[str] = frozenset(),
) -> ModelProto:
    """A model that can run: every weight of the template becomes an initializer.

    Args:
        template: the graph.
        initializer: returns the tensor of a weight; its shape may differ from the one in the trace.
        labels: length of the output's last axis; None leaves it open.
        metadata: of the model.
        overridable: weights that stay inputs, with the initializer as default.
    """
    proto = ModelProto()
    proto.CopyFrom(template.proto)
    graph = proto.graph
    weights = template.shapes
    inputs = [value for value in graph.input if value.name not in weights]
    inputs += [
        make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(weights[name])) for name in sorted(overridable)
    ]
    del graph.input[:]
    graph.input.extend(inputs)
    for name in weights:
        graph.initializer.append(initializer(name))
    if template.kind.has_labels:
        last = graph.output[0].type.tensor_type.shape.dim[-1]
        last.Clear()
        if labels is None:
            last.dim_param = "num_labels"
        else:
            last.dim_value = labels
    onnx.helper.set_model_props(proto, dict(metadata))
    return proto
