"""The files of tasks, in every form."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from converters.inference.adapter_file import write_adapter_file
from converters.models import config as model_config
from converters.outputs.onnx.graphs.merged import shared_weights, write_base, write_merged, write_sharing
from converters.outputs.onnx.graphs.quantization import Quantized, quantize
from converters.outputs.onnx.graphs.self_merging import write_self_merging
from converters.outputs.onnx.graphs.swappable import adapter_parameters, check_swappable, write_swappable
from converters.outputs.onnx.graphs.task_weights import TaskWeights
from converters.outputs.onnx.graphs.traced import TracedBase
from converters.outputs.onnx.options import ExportOptions, Form
from converters.outputs.onnx.plan import MODEL_FILES

WEB_FOLDER = "onnx"  # where transformers.js looks for graphs


@dataclass(frozen=True)
class TaskFiles:
    """What was written for a task.

    Attributes:
        task: its name.
        models: precision -> graph, relative to the folder.
        adapter: its adapter file, of a swappable graph.
        quantized: precision -> how many linear layers have it.
    """

    task: str
    models: Mapping[str, str]
    adapter: str | None = None
    quantized: Mapping[str, Quantized] = field(default_factory=dict)


def write_tasks(
    folder: Path, traced: TracedBase, tasks: Sequence[TaskWeights], options: ExportOptions, device: torch.device
) -> list[TaskFiles]:
    """Write graphs, weights and adapter files of the tasks into a folder.

    Raises `ConversionError` when the form cannot express what a task does.
    """
    if options.form is Form.MERGED:
        return [_write_merged(folder, traced, task, options) for task in tasks]
    if options.form is Form.SWAPPABLE:
        return _write_swappable(folder, traced, tasks, device)
    return _write_sharing(folder, traced, tasks, options.form)


def _write_merged(folder: Path, traced: TracedBase, task: TaskWeights, options: ExportOptions) -> TaskFiles:
    within = WEB_FOLDER if options.transformersjs else "."
    (folder / within).mkdir(exist_ok=True)
    models = {
        precision: (Path(within) / MODEL_FILES[precision]).as_posix() for precision in ("fp32", *options.quantize)
    }
    write_merged(folder / models["fp32"], traced, task, _labels(task), _metadata(task, options.form))
    quantized = {
        precision: quantize(folder / models["fp32"], folder / models[precision], precision)
        for precision in options.quantize
    }
    return TaskFiles(task.plan.name, models, quantized=quantized)


def _write_sharing(folder: Path, traced: TracedBase, tasks: Sequence[TaskWeights], form: Form) -> list[TaskFiles]:
    """A graph for each task, and one file of the weights they share."""
    merges_itself = form is Form.SELF_MERGING
    own = [(task.whole if merges_itself else task.tensors).keys() for task in tasks]
    shared = write_base(folder, shared_weights(traced, own))
    write = write_self_merging if merges_itself else write_sharing
    written = []
    for task in tasks:
        model = f"{task.plan.name}.onnx"
        write(folder / model, traced, task, shared, _labels(task), _metadata(task, form))
        written.append(TaskFiles(task.plan.name, {"fp32": model}))
    return written


def _write_swappable(
    folder: Path, traced: TracedBase, tasks: Sequence[TaskWeights], device: torch.device
) -> list[TaskFiles]:
    check_swappable(traced, tasks)
    fingerprint, model = tasks[0].plan.base.fingerprint, MODEL_FILES["fp32"]
    common = {"peanut.base": fingerprint, "peanut.form": Form.SWAPPABLE.value}
    write_swappable(folder / model, traced, tasks, common)
    written = []
    for task in tasks:
        adapter = f"{task.plan.name}.onnx_adapter"
        write_adapter_file(folder / adapter, adapter_parameters(traced, tasks, task, device), fingerprint)
        written.append(TaskFiles(task.plan.name, {"fp32": model}, adapter))
    return written


def _labels(task: TaskWeights) -> int | None:
    labels = model_config.labels_of(task.plan.config)
    return len(labels) if labels else None


def _metadata(task: TaskWeights, form: Form) -> dict[str, str]:
    """The metadata of a graph."""
    labels = model_config.labels_of(task.plan.config)
    return {
        "peanut.base": task.plan.base.fingerprint,
        "peanut.form": form.value,
        "peanut.task": task.plan.name,
        "peanut.adapters": " ".join(weighted.adapter.digest for weighted in task.plan.adapters),
        **({"id2label": json.dumps(dict(enumerate(labels)))} if labels else {}),
    }
