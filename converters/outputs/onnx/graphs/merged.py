"""Graphs with merged weights: one task in a file of its own, or several that share unchanged weights."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto
from torch import Tensor

from converters.outputs.onnx.graphs.model_file import declared, external_data, save_model
from converters.outputs.onnx.graphs.task_weights import TaskWeights
from converters.outputs.onnx.graphs.template import bind
from converters.outputs.onnx.graphs.traced import TracedBase
from converters.outputs.onnx.graphs.weights_file import WeightsFile

BASE_DATA = "base.onnx_data"


def write_merged(
    model: Path, traced: TracedBase, task: TaskWeights, labels: int | None, metadata: Mapping[str, str]
) -> None:
    """Write one task: a single file, or a graph with a file of weights if they are too large for one."""
    weights = {name: task.tensors.get(name, weight) for name, weight in traced.weights.items()}
    proto = bind(traced.template, lambda name: declared(name, weights[name]), labels=labels, metadata=metadata)
    save_model(model, proto, weights)


def write_base(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, TensorProto]:
    """Write the weights that graphs in `folder` share; returns their initializers."""
    return _write(folder / BASE_DATA, weights)


def shared_weights(traced: TracedBase, own: Sequence[Collection[str]]) -> dict[str, Tensor]:
    """The base's weights that at least one task uses; `own` are the names of the weights that each task replaces."""
    return {name: weight for name, weight in traced.weights.items() if not all(name in names for names in own)}


def write_sharing(
    model: Path,
    traced: TracedBase,
    task: TaskWeights,
    shared: Mapping[str, TensorProto],
    labels: int | None,
    metadata: Mapping[str, str],
) -> None:
    """Write one task of several, with a file of the weights it changes; `shared` lies in the same folder."""
    own = {name: tensor for name, tensor in task.tensors.items() if name in traced.weights}
    initializers = {**shared, **_write(external_data(model), own)}
    onnx.save(bind(traced.template, initializers.__getitem__, labels=labels, metadata=metadata), model)


def _write(file: Path, weights: Mapping[str, Tensor]) -> dict[str, TensorProto]:
    with WeightsFile(file) as data:
        return {name: data.add(name, tensor) for name, tensor in weights.items()}
