"""`peanut-merge --format onnx`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from converters.errors import OptionError

if TYPE_CHECKING:
    from converters.outputs.upload import Push
    from converters.plans.merge import Plan


Opset = Annotated[int | None, typer.Option("--opset", help="ONNX: by default 18, which runs nearly everywhere.")]
Quantize = Annotated[
    list[str] | None, typer.Option("--quantize", help="ONNX: also int8 (dynamic) or fp16; again for both.")
]
Evaluation = Annotated[
    Path | None, typer.Option("--eval-data", help="ONNX: measure on DIR/<label>/image.png, or a CSV of texts.")
]
TransformersJs = Annotated[
    bool, typer.Option("--transformersjs", help="ONNX: files where transformers.js looks for them.")
]
Swappable = Annotated[
    bool, typer.Option("--swappable", help="ONNX: one graph, and a small .onnx_adapter for each task.")
]
SelfMerging = Annotated[
    bool, typer.Option("--self-merging", help="ONNX: θ and f in the graph, which merges itself when loaded.")
]


@dataclass(frozen=True)
class OnnxChoices:
    """The options of `peanut-merge` that are for ONNX alone; see its help."""

    opset: int | None = None
    quantize: tuple[str, ...] = ()
    eval_data: Path | None = None
    transformersjs: bool = False
    swappable: bool = False
    self_merging: bool = False

    def check_unused(self, output_format: str) -> None:
        """Raise `OptionError` if one was given although the format is another."""
        given = {
            "--opset": self.opset is not None,
            "--quantize": self.quantize,
            "--eval-data": self.eval_data is not None,
            "--transformersjs": self.transformersjs,
            "--swappable": self.swappable,
            "--self-merging": self.self_merging,
        }
        for name, value in given.items():
            if value:
                raise OptionError(f"{name} is for --format onnx, not for --format {output_format}")


def write_onnx(
    plans: "Sequence[Plan]",
    output: Path | None,
    choices: OnnxChoices,
    push: "Push",
    *,
    share: bool,
    device: str,
    overwrite: bool,
    verify: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Export planned merges, in float32, and tell what was written."""
    from converters.api.exporting import require_onnx

    require_onnx()
    from converters.cli import console_onnx
    from converters.outputs.onnx.opset import DEFAULT_OPSET
    from converters.outputs.onnx.plan import ExportOptions, Form, plan_export
    from converters.outputs.onnx.write import run_export

    forms = {Form.SHARED: share, Form.SWAPPABLE: choices.swappable, Form.SELF_MERGING: choices.self_merging}
    chosen = [form for form, wanted in forms.items() if wanted]
    if len(chosen) > 1:
        raise OptionError("--share, --swappable and --self-merging are different forms; choose one: see the README")
    options = ExportOptions(
        form=chosen[0] if chosen else Form.MERGED,
        opset=DEFAULT_OPSET if choices.opset is None else choices.opset,
        quantize=tuple(dict.fromkeys(choices.quantize)),
        transformersjs=choices.transformersjs,
        eval_data=choices.eval_data,
        verify=verify,
        device=device,
    )
    planned = plan_export(plans, output, options, overwrite=overwrite)
    if push.repo_id and len(planned.outputs) > 1:
        raise OptionError("--push-to-hub takes one output, this makes several; push each with: hf upload")
    if dry_run:
        console_onnx.print_plan(planned, as_json)
        return
    push.prepare(plans)
    with console_onnx.Steps() as report:
        result = run_export(planned, overwrite=overwrite, report=report)
    console_onnx.print_result(result, as_json, push.upload(result.tasks[0].output))
