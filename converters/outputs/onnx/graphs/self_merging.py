"""Graphs that carry θ and f: `W0 + f(W0; θ)` is computed once, when ONNX Runtime folds constants at load.

No formula is written down again here: `_Merge` calls the method's own, and torch traces it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from torch import Tensor

from converters.errors import ConversionError
from converters.methods.weight_delta import WeightDelta
from converters.outputs.onnx.graphs.task_weights import TaskWeights
from converters.outputs.onnx.graphs.template import bind, trace_module
from converters.outputs.onnx.graphs.template_cache import cached_graph
from converters.outputs.onnx.graphs.traced import TracedBase
from converters.outputs.onnx.graphs.weights_file import inline


def write_self_merging(
    model: Path,
    traced: TracedBase,
    task: TaskWeights,
    shared: Mapping[str, TensorProto],
    labels: int | None,
    metadata: Mapping[str, str],
) -> None:
    """Write one task: its θ and heads are in the graph; `shared`, the base's weights, lies in the same folder."""
    whole = {name: inline(name, tensor) for name, tensor in task.whole.items() if name in traced.weights}
    proto = bind(traced.template, {**shared, **whole}.__getitem__, labels=labels, metadata=metadata)
    opset = traced.template.proto.opset_import[0].version
    merging: list[NodeProto] = []
    for name, planned in task.updated.items():
        merged = name
        for index, term in enumerate(planned.terms):
            delta = task.plan.delta_of(term).to("cpu", torch.float32)
            kind = json.dumps([delta.kind, planned.shape, opset])
            if kind not in traced.updates:
                method = task.plan.adapters[term.adapter].adapter.describe(term.module).name
                traced.updates[kind] = _trace_update(delta, planned.shape, opset, kind, method)
            prefix = f"{name}/{index}/"
            theta = {prefix + part: tensor for part, tensor in delta.parts.items()}
            proto.graph.initializer.extend(inline(part, tensor) for part, tensor in theta.items())
            total, merged = merged, f"{prefix}merged"
            nodes, constants = _instance(traced.updates[kind], [total, name, *theta], merged, prefix)
            merging += nodes
            proto.graph.initializer.extend(constants)
        _replace_input(proto, name, merged)
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*merging, *rest])
    onnx.save(proto, model)


class _Merge(torch.nn.Module):
    """`total + delta(W0; θ)`, of a delta whose tensors are inputs."""

    def __init__(self, delta: WeightDelta) -> None:
        super().__init__()
        self._delta = delta

    def forward(self, total: Tensor, w0: Tensor, *theta: Tensor) -> Tensor:
        """`total` and `w0` as the weight is stored; θ in the order of the delta's parts."""
        delta = self._delta.with_parts(dict(zip(self._delta.parts, theta, strict=True)))
        if w0.dim() == 1:  # a bias
            return total + delta.delta(w0[:, None])[:, 0]
        if w0.dim() > 2:  # a convolution, as a matrix
            return total + delta.delta(w0.flatten(1)).reshape(w0.shape)
        return total + delta.delta(w0)


def _trace_update(delta: WeightDelta, shape: tuple[int, ...], opset: int, kind: str, method: str) -> GraphProto:
    """The graph of one update: inputs `total`, `w0` and θ, one output.

    Raises `ConversionError` for a formula that ONNX has no operators for.
    """
    total, w0 = torch.zeros(shape), torch.zeros(shape)  # one tensor as both would be traced as one input
    names = ["total", "w0", *delta.parts]
    inputs = (total, w0, *delta.parts.values())
    try:
        return cached_graph(
            {"merge": kind}, lambda: trace_module(_Merge(delta), inputs, names, ["merged"], opset)
        ).graph
    except ConversionError as error:
        raise ConversionError(
            f"a graph cannot merge a {method} adapter by itself, since ONNX lacks an operator for its formula; leave "
            f"--self-merging out ({error})"
        ) from None


def _instance(
    graph: GraphProto, inputs: Sequence[str], result: str, prefix: str
) -> tuple[list[NodeProto], list[TensorProto]]:
    """A copy of a graph under names of its own: its nodes and constants."""
    names = {value.name: given for value, given in zip(graph.input, inputs, strict=True)}
    names[graph.output[0].name] = result
    names[""] = ""  # an optional input that is left out

    def renamed(name: str) -> str:
        return names.setdefault(name, prefix + name)

    constants = []
    for constant in graph.initializer:
        copy = TensorProto()
        copy.CopyFrom(constant)
        copy.name = renamed(constant.name)
        constants.append(copy)
    nodes = []
    for original in graph.node:
        node = NodeProto()
        node.CopyFrom(original)
        node.name = prefix + original.name
        node.input[:] = [renamed(name) for name in original.input]
        node.output[:] = [renamed(name) for name in original.output]
        nodes.append(node)
    return nodes, constants


def _replace_input(proto: ModelProto, old: str, new: str) -> None:
    """Let every node that reads `old` read `new`."""
    for node in proto.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
