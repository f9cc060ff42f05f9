"""Carrying out an export: all output folders appear at the end, complete, or none does."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.evaluation.worker import find_devices
from converters.models.architecture import build_architecture
from converters.outputs.base import Report, WriteOptions
from converters.outputs.onnx.checks import TaskCheck, check_task, prepare_eval_data
from converters.outputs.onnx.graphs.reference import Reference
from converters.outputs.onnx.graphs.task_weights import check_task_accounts, evaluate_task
from converters.outputs.onnx.graphs.template_cache import graph_config, traced_template
from converters.outputs.onnx.graphs.traced import TracedBase
from converters.outputs.onnx.kind import kind_of
from converters.outputs.onnx.plan import ExportPlan
from converters.outputs.onnx.records import shared_companions, write_records
from converters.outputs.onnx.task_files import TaskFiles, write_tasks
from converters.outputs.publishing import publishing
from converters.plans.merge import Plan


@dataclass(frozen=True)
class ExportedTask:
    """One task of an export.

    Attributes:
        output: the folder it is in.
        plan: the merge it computes.
        files: what was written.
        check: how it was checked.
        nbytes: size of the files that only this task uses.
        seconds: time of evaluating and writing it, without its checks; an equal share for tasks written together.
    """

    output: Path
    plan: Plan
    files: TaskFiles
    check: TaskCheck
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        tasks: in the order they were given.
        loading_seconds: time of loading the base and tracing it, or finding its graph in the cache.
    """

    tasks: tuple[ExportedTask, ...]
    loading_seconds: float


def run_export(planned: ExportPlan, *, overwrite: bool = False, report: Report = lambda step: None) -> ExportResult:
    """Carry out a planned export.

    Raises:
        ConversionError: the tracer cannot follow the model, or the form cannot express what a task does.
        VerificationError: a graph does not compute what torch does.
        OutputError: a file could not be written. Whichever error it is, no output was written or changed.
    """
    writer = _Writer(planned, report)
    tasks: list[ExportedTask] = []
    with publishing(planned.outputs, WriteOptions(overwrite=overwrite)) as folders:
        for output, plans in planned.outputs.items():
            tasks += writer.write(folders[output], output, plans)
    return ExportResult(tuple(tasks), writer.loading_seconds)


class _Writer:
    """Writes folders; loads and traces each class of model once."""

    def __init__(self, planned: ExportPlan, report: Report) -> None:
        self._planned, self._report = planned, report
        self._device = find_devices(planned.options.device)[0]
        self._traced: dict[str, TracedBase] = {}
        self.loading_seconds = 0.0

    def write(self, folder: Path, output: Path, plans: Sequence[Plan]) -> list[ExportedTask]:
        """Write one folder, and check it."""
        options = self._planned.options
        traced = self._base_of(plans, self._planned.shapes[output])
        shared_companions(plans).write(folder)
        prepared = prepare_eval_data(folder, traced.reference.kind, plans[0].config, self._planned.eval_data)
        start = time.perf_counter()
        self._report(f"evaluating and writing {', '.join(plan.name for plan in plans)}")
        tasks = [traced.within(evaluate_task(plan, traced.arch, self._device)) for plan in plans]
        for task in tasks:
            traced.check_complete(task)
        files = write_tasks(folder, traced, tasks, options, self._device)
        for task in tasks:
            check_task_accounts(task, traced.arch)
        seconds = (time.perf_counter() - start) / len(plans)
        checks = []
        for one, task in zip(files, tasks, strict=True):
            self._report(f"checking {one.task}")
            checks.append(check_task(folder, one, task, traced.reference, prepared, options.verify))
        write_records(folder, plans, files, checks, options)
        return [
            ExportedTask(output, plan, one, check, _own_bytes(folder, one), seconds)
            for plan, one, check in zip(plans, files, checks, strict=True)
        ]

    def _base_of(self, plans: Sequence[Plan], shape: tuple[int, ...] | None) -> TracedBase:
        """The base, loaded as the class of plans that share a graph, and traced."""
        plan = plans[0]
        name = plan.config["architectures"][0]
        key = json.dumps([graph_config(plan.config), shape], sort_keys=True)
        if key not in self._traced:
            start = time.perf_counter()
            self._report("loading the base")
            reference = Reference(plans, kind_of(plan), shape, self._planned.options.interpolate_pos_encoding)
            self._report("tracing it")
            template = traced_template(reference, plan.config, self._planned.options.opset, shape)
            self._traced[key] = TracedBase(build_architecture(plan.config, name), reference, template)
            self.loading_seconds += time.perf_counter() - start
        return self._traced[key]


def _own_bytes(folder: Path, files: TaskFiles) -> int:
    """Bytes of the files that only this task uses."""
    own = [files.adapter] if files.adapter else [*files.models.values()]
    paths = [folder / name for model in own for name in (model, f"{model}_data")]
    return sum(path.stat().st_size for path in paths if path.is_file())
