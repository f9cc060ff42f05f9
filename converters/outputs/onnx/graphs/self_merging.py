"""Graphs that carry θ and f: `W0 + f(W0; θ)` is computed once, when ONNX Runtime folds constants at load.

f is not written down again here: `_Merge` calls the toolkit's own, and torch traces it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from torch import Tensor

from converters.methods.peanut import Tweaker
from converters.methods.update import delta_weight
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
            tweaker = task.plan.tweaker(term).to("cpu", torch.float32)
            kind = _kind_of(tweaker, planned.shape, opset)
            if kind not in traced.updates:
                traced.updates[kind] = _trace_update(tweaker, planned.shape, opset, kind)
            prefix = f"{name}/{index}/"
            theta = {prefix + part: tensor for part, tensor in _parts(tweaker).items()}
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
    """`total + f(W0; θ)`, of a tweaker whose tensors are inputs."""

    def __init__(self, tweaker: Tweaker) -> None:
        super().__init__()
        self._tweaker = tweaker

    def forward(self, total: Tensor, w0: Tensor, *theta: Tensor) -> Tensor:
        """`total` and `w0` (out, in); θ in the order of `_parts`."""
        depth, rest = len(self._tweaker.encoders), theta[2:]
        tweaker = replace(self._tweaker, a=theta[0], b=theta[1], encoders=rest[:depth], decoders=rest[depth:])
        return total + delta_weight(w0, tweaker)


def _parts(tweaker: Tweaker) -> dict[str, Tensor]:
    """The tensors of θ, in order."""
    return {
        "A": tweaker.a,
        "B": tweaker.b,
        **{f"encoders.{i}": layer for i, layer in enumerate(tweaker.encoders)},
        **{f"decoders.{i}": layer for i, layer in enumerate(tweaker.decoders)},
    }


def _kind_of(tweaker: Tweaker, shape: tuple[int, ...], opset: int) -> str:
    """What the graph of an update depends on, besides the numbers in θ; JSON."""
    settings = (tweaker.act_fn, tweaker.scaling, tweaker.residual, tweaker.output_act_fn, tweaker.negative_slope)
    sizes = (tweaker.r, len(tweaker.encoders), len(tweaker.decoders), *shape)
    return json.dumps([tweaker.orientation.value, *settings, *sizes, opset])


def _trace_update(tweaker: Tweaker, shape: tuple[int, ...], opset: int, kind: str) -> GraphProto:
    """The graph of one update: inputs `total`, `w0` and θ, one output."""
    total, w0 = torch.zeros(shape), torch.zeros(shape)  # one tensor as both would be traced as one input
    theta = tuple(_parts(tweaker).values())
    names = ["total", "w0", *_parts(tweaker)]
    return cached_graph(
        {"merge": kind}, lambda: trace_module(_Merge(tweaker), (total, w0, *theta), names, ["merged"], opset)
    ).graph


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
