"""What the commands show of ONNX exports."""

import json
from typing import Any

from rich.status import Status

from converters.cli.console import err, out, print_pushed, pushed_facts, size_text
from converters.outputs.onnx.checks import TORCH
from converters.outputs.onnx.eval_data import Score
from converters.outputs.onnx.plan import ExportPlan
from converters.outputs.onnx.write import ExportedTask, ExportResult, Report


class Steps:
    """A spinner on stderr with the step that is under way, nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._status: Status | None = err.status("planning") if err.is_terminal else None

    def __enter__(self) -> Report:
        if self._status is None:
            return lambda step: None
        self._status.start()
        return self._status.update

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()


def print_plan(planned: ExportPlan, as_json: bool) -> None:
    """What an export would write."""
    options = planned.options
    if as_json:
        facts = [
            {
                "output": str(folder),
                "tasks": [plan.name for plan in plans],
                "form": options.form.value,
                "opset": options.opset,
                "bytes_at_most": planned.sizes[folder],
                "image_shape": planned.image_shapes[folder],
            }
            for folder, plans in planned.outputs.items()
        ]
        notes = [note for plan in planned.plans for note in plan.notes]
        print(json.dumps({"outputs": facts, "notes": notes, "dry_run": True}, indent=2))
        return
    for folder, plans in planned.outputs.items():
        names = ", ".join(plan.name for plan in plans)
        size = size_text(planned.sizes[folder])
        out.print(f"would write {folder}: {options.form.value}, opset {options.opset}, {size} at most", markup=False)
        out.print(f"  {names}", markup=False)


def print_result(result: ExportResult, as_json: bool, pushed_to: str | None = None) -> None:
    """What an export wrote, how well it was checked, and how well it does."""
    if as_json:
        facts = {"loading_seconds": round(result.loading_seconds, 3), "tasks": [_facts(one) for one in result.tasks]}
        print(json.dumps({**facts, **pushed_facts(pushed_to)}, indent=2))
        return
    for task in result.tasks:
        _print_task(task)
    print_pushed(pushed_to)


def _facts(task: ExportedTask) -> dict[str, Any]:
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


def _print_task(task: ExportedTask) -> None:
    files, check = task.files, task.check
    names = ", ".join([files.adapter] if files.adapter else files.models.values())
    own = "" if task.files.adapter is None else f" for {files.models['fp32']}"
    out.print(f"wrote {task.output}: {names}{own}, {size_text(task.nbytes)} in {task.seconds:.1f} s", markup=False)
    if check.parity is not None:
        sizes = ", ".join(map(str, check.parity.batch_sizes))
        out.print(
            f"  verified: {check.parity.examples} inputs ({check.parity.real} real) in batches of {sizes}: largest "
            f"difference to torch {check.parity.largest_difference:.1e}, top-1 agreement {check.parity.agreement:.2%}"
        )
    for precision, one in files.quantized.items():
        out.print(f"  {precision}: {one.quantized} of {one.linears} linear layers, {size_text(one.nbytes)}")
    for name, score in check.scores.items():
        agreed = "" if name == TORCH else f", agrees with torch on {check.agreement(name):.2%}"
        out.print(f"  {name}: {_told(score)}{agreed}")


def _told(score: Score) -> str:
    if score.accuracy is not None:
        return f"accuracy {score.accuracy:.2%} of {score.count}"
    pearson = "undefined" if score.pearson is None else f"{score.pearson:.4f}"
    return f"Pearson {pearson}, mean absolute error {score.mean_absolute_error:.4f} of {score.count}"
