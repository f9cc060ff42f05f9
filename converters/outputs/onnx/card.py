"""The README.md of an export, with the metadata the Hub reads."""

import json
from collections.abc import Sequence

from converters.files.names import MANIFEST_NAME
from converters.outputs.model_card import adapter_rows, base_id_of, formulas_of
from converters.outputs.onnx.checks import TaskCheck
from converters.outputs.onnx.kind import kind_of
from converters.outputs.onnx.options import ExportOptions, Form
from converters.outputs.onnx.task_files import TaskFiles
from converters.plans.merge import Plan

_HOW = {
    Form.MERGED: "The weights of the adapter are merged.",
    Form.SHARED: "Each task has a graph, and a file of the weights it changes; `base.onnx_data` has what they share.",
    Form.SWAPPABLE: "One graph for all tasks: each is an `.onnx_adapter`, to be passed to a run (LoraAdapter of ONNX "
    "Runtime, not by I/O binding). Without one, the logits are NaN.",
    Form.SELF_MERGING: "Each graph holds θ and merges itself into W0 when it is loaded; `base.onnx_data` has W0.",
}


def build_onnx_card(
    plans: Sequence[Plan], files: Sequence[TaskFiles], checks: Sequence[TaskCheck], options: ExportOptions
) -> str:
    """Markdown with a YAML header. JSON strings are YAML strings."""
    base = plans[0].base
    base_id = base_id_of(plans[0])
    library = "transformers.js" if options.transformersjs else "onnx"
    head = [f"library_name: {library}", "tags:", "- onnx", "- peanut", "- peft"]
    if base_id is not None:
        head = [f"base_model: {json.dumps(base_id)}", "base_model_relation: finetune", *head]
    head.append(f"pipeline_tag: {kind_of(plans[0]).task}")
    formulas = "; ".join(dict.fromkeys(formula for plan in plans for formula in formulas_of(plan)))
    lines = [
        f"# {base.name} with {', '.join(plan.name for plan in plans)}, as ONNX",
        "",
        f"{base_id or base.name} with trained adapters, as ONNX graphs (opset {options.opset}) for ONNX Runtime: "
        f"{formulas}. {_HOW[options.form]}",
    ]
    for plan, written, check in zip(plans, files, checks, strict=True):
        lines += ["", f"## {written.task}", "", "| | |", "|---|---|"]
        lines += [f"| graph, {precision} | `{model}` |" for precision, model in written.models.items()]
        lines += [f"| adapter file | `{written.adapter}` |"] if written.adapter else []
        lines += [line for weighted in plan.adapters for line in adapter_rows(weighted)]
        lines += [f"| {name} | {_score_text(check, name)} |" for name in check.scores]
    return "\n".join(["---", *head, "---", "", *lines, "", f"Written by peanut-serve; see `{MANIFEST_NAME}`.", ""])


def _score_text(check: TaskCheck, name: str) -> str:
    score = check.scores[name]
    if score.accuracy is not None:
        return f"accuracy {score.accuracy:.4f} on {score.count} examples"
    return f"mean absolute error {score.mean_absolute_error:.4f} on {score.count} examples"
