"""Graphs with merged weights: one task in a file of its own, or several that share what none of them changes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto
from torch import Tensor

from converters.onnx_export.task_weights import TaskWeights
from converters.onnx_export.template import bind
from converters.onnx_export.traced import TracedBase
from converters.onnx_export.weights_file import WeightsFile, inline

# protobuf ends at 2 GiB; what is not weights takes a few MB
SINGLE_FILE_BYTES = 2_000_000_000
BASE_DATA = "base.onnx_data"


def external_data(model: Path) -> Path:
    """The file beside a graph that holds its weights."""
    return model.with_name(f"{model.name}_data")


def write_merged(
    model: Path, traced: TracedBase, task: TaskWeights, labels: int | None, metadata: Mapping[str, str]
) -> None:
    """Write one task: a single file, or with its weights beside it where they are too large for one."""
    weights = {name: task.tensors.get(name, weight) for name, weight in traced.weights.items()}
    onnx.save(bind(traced.template, store(model, weights), labels=labels, metadata=metadata), model)


def store(model: Path, weights: Mapping[str, Tensor]) -> Callable[[str], TensorProto]:
    """What gives the initializers of a graph: in it, or in a file beside it where they are too large for one."""
    if sum(tensor.nbytes for tensor in weights.values()) <= SINGLE_FILE_BYTES:
        return lambda name: inline(name, weights[name])
    return _write(external_data(model), weights).__getitem__


def write_base(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, TensorProto]:
    """Write what graphs in `folder` share; returns their initializers."""
    return _write(folder / BASE_DATA, weights)


def shared_weights(traced: TracedBase, own: Sequence[Collection[str]]) -> dict[str, Tensor]:
    """The base's weights that at least one task does not bring; `own` are the names each of them brings."""
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
