"""One graph for many tasks: each linear layer that any of them adapts takes an optional low-rank input.

ONNX Runtime feeds such inputs from a LoraAdapter (https://onnxruntime.ai/docs/genai/tutorials/finetune.html). Without
one their rank is zero. A head that a task replaces is NaN until an adapter brings it: the runtime forgets adapters in
silence in some of its calls (I/O binding), and NaN is no answer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import make_node, make_tensor_value_info
from torch import Tensor

from converters.errors import ConversionError
from converters.evaluation.factors import refuse_full_rank, sum_factors
from converters.files.reader import TensorReader
from converters.outputs.onnx.graphs.model_file import declared, save_model
from converters.outputs.onnx.graphs.task_weights import TaskWeights
from converters.outputs.onnx.graphs.template import bind
from converters.outputs.onnx.graphs.traced import TracedBase


def check_swappable(traced: TracedBase, tasks: Sequence[TaskWeights]) -> None:
    """Raise `ConversionError` if low-rank inputs cannot say what a task does, or a task lacks a head."""
    whole = _whole(traced, tasks)
    for task in tasks:
        refuse_full_rank(task.plan, task.updated)
        if lacking := sorted((whole - task.tensors.keys()) & traced.reference.missing):
            raise ConversionError(
                f"{task.plan.name} does not bring {lacking[0]}, which the base has not and other tasks bring; "
                "export it apart"
            )
        if both := sorted(whole & task.updated.keys()):
            raise ConversionError(
                f"{both[0]} is replaced whole by one task and updated by another; export them apart"
            )


def write_swappable(
    model: Path, traced: TracedBase, tasks: Sequence[TaskWeights], metadata: Mapping[str, str]
) -> None:
    """Write the graph that all of the tasks' adapter files fit.

    Raises `ConversionError` for an adapted weight that is not that of a linear layer.
    """
    whole = frozenset(_whole(traced, tasks))
    adapted = sorted({name for task in tasks for name in task.updated})
    weights = dict(traced.weights)
    for name in whole:
        weights[name] = torch.full_like(weights[name], torch.nan)
    proto = bind(
        traced.template,
        lambda name: declared(name, weights[name]),
        labels=None,
        metadata=metadata,
        overridable=whole,
    )
    for name in adapted:
        out, width = traced.linear_shape(name)
        _add_low_rank(proto, name, out, width)
    save_model(model, proto, weights)


def adapter_parameters(
    traced: TracedBase, tasks: Sequence[TaskWeights], task: TaskWeights, device: torch.device
) -> dict[str, Tensor]:
    """What the adapter file of one of the tasks holds, float32: low-rank inputs; its heads, or else the base's."""
    parameters = {name: task.tensors.get(name, traced.weights[name]).contiguous() for name in _whole(traced, tasks)}
    with TensorReader() as reader:
        for name, planned in task.updated.items():
            up, down = sum_factors(task.plan, planned, reader, device)
            for key, factor in zip(_input_names(name), (down, up), strict=True):
                parameters[key] = factor.T.float().contiguous()
    return parameters


def _whole(traced: TracedBase, tasks: Sequence[TaskWeights]) -> set[str]:
    """Weights of the graph that one of the tasks replaces."""
    return {name for task in tasks for name in task.whole if name in traced.weights}


def _input_names(weight: str) -> tuple[str, str]:
    """The low-rank inputs of a linear layer, lora_A (in, r) and lora_B (r, out), for `x @ lora_A @ lora_B`."""
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A", f"{module}.lora_B"


def _add_low_rank(proto: ModelProto, weight: str, out: int, width: int) -> None:
    """Add `x @ lora_A @ lora_B` to what every linear layer with this weight computes from x."""
    graph = proto.graph
    names = _input_names(weight)
    shapes = ((width, 0), (0, out))
    axes: tuple[list[str | int | None], ...] = ([width, f"{weight}.r"], [f"{weight}.r", out])
    for name, shape, dims in zip(names, shapes, axes, strict=True):
        graph.initializer.append(TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT))
        graph.input.append(make_tensor_value_info(name, TensorProto.FLOAT, dims))
    users = _linear_nodes(proto, weight)
    if not users:
        raise ConversionError(f"{weight} is not the weight of a linear layer in the graph; merge it instead")
    for user in users:
        position = list(graph.node).index(user)
        source, result = user.input[0], user.output[0]
        user.output[0] = f"{result}/base"
        added = (
            make_node("MatMul", [source, names[0]], [f"{result}/lora_A"]),
            make_node("MatMul", [f"{result}/lora_A", names[1]], [f"{result}/lora_B"]),
            make_node("Add", [f"{result}/base", f"{result}/lora_B"], [result]),
        )
        for node in reversed(added):
            graph.node.insert(position + 1, node)


def _linear_nodes(proto: ModelProto, weight: str) -> list[NodeProto]:
    """The nodes that multiply by a weight, as it is or transposed."""
    nodes = proto.graph.node
    transposed = {node.output[0] for node in nodes if node.op_type == "Transpose" and node.input[0] == weight}
    return [
        node
        for node in nodes
        if node.op_type in ("MatMul", "Gemm") and len(node.input) > 1 and node.input[1] in {weight, *transposed}
    ]
