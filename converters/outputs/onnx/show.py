"""What a command prints of ONNX exports."""

from typing import Any

from converters.files.sizes import size_text
from converters.outputs.base import Shown
from converters.outputs.onnx.checks import TORCH
from converters.outputs.onnx.eval_data import Score
from converters.outputs.onnx.plan import ExportPlan
from converters.outputs.onnx.write import ExportedTask, ExportResult


def show_plan(planned: ExportPlan) -> Shown:
    """What an export would write."""
    options = planned.options
    outputs = [
        {
            "output": str(folder),
            "tasks": [plan.name for plan in plans],
            "form": options.form.value,
            "opset": options.opset,
            "bytes_at_most": planned.sizes[folder],
            "image_shape": planned.shapes[folder],
        }
        for folder, plans in planned.outputs.items()
    ]
    notes = [note for plan in planned.plans for note in plan.notes]
    lines = []
    for folder, plans in planned.outputs.items():
        size = size_text(planned.sizes[folder])
        lines.append(f"would write {folder}: {options.form.value}, opset {options.opset}, {size} at most")
        lines.append(f"  {', '.join(plan.name for plan in plans)}")
    return Shown({"outputs": outputs, "notes": notes, "dry_run": True}, tuple(lines))


def show_result(result: ExportResult) -> Shown:
    """What an export wrote, how well it was checked, and its scores."""
    facts = {
        "loading_seconds": round(result.loading_seconds, 3),
        "tasks": [_task_facts(task) for task in result.tasks],
    }
    return Shown(facts, tuple(line for task in result.tasks for line in _task_lines(task)))


def _task_facts(task: ExportedTask) -> dict[str, Any]:
    return {
        "output": str(task.output),
        "task": task.files.task,
        "models": dict(task.files.models),
        "adapter": task.files.adapter,
        "bytes": task.nbytes,
        "seconds": round(task.seconds, 3),
        "notes": task.plan.notes,
        "quantized": {precision: one.summary() for precision, one in task.files.quantized.items()},
        **task.check.summary(),
    }


def _task_lines(task: ExportedTask) -> list[str]:
    files, check = task.files, task.check
    names = ", ".join([files.adapter] if files.adapter else files.models.values())
    graph = "" if files.adapter is None else f" for {files.models['fp32']}"
    lines = [f"wrote {task.output}: {names}{graph}, {size_text(task.nbytes)} in {task.seconds:.1f} s"]
    if check.parity is not None:
        sizes = ", ".join(map(str, check.parity.batch_sizes))
        lines.append(
            f"  verified: {check.parity.examples} inputs ({check.parity.real} real) in batches of {sizes}: largest "
            f"difference from torch {check.parity.largest_difference:.1e}, "
            f"top-1 agreement {check.parity.agreement:.2%}"
        )
    for precision, one in files.quantized.items():
        lines.append(f"  {precision}: {one.quantized} of {one.linears} linear layers, {size_text(one.nbytes)}")
    for name, score in check.scores.items():
        agreed = "" if name == TORCH else f", agrees with torch on {check.agreement(name):.2%}"
        lines.append(f"  {name}: {_score_text(score)}{agreed}")
    return lines


def _score_text(score: Score) -> str:
    if score.accuracy is not None:
        return f"accuracy {score.accuracy:.2%} of {score.count}"
    pearson = "undefined" if score.pearson is None else f"{score.pearson:.4f}"
    return f"Pearson {pearson}, mean absolute error {score.mean_absolute_error:.4f} of {score.count}"
