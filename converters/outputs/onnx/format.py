"""The format `onnx`. What needs the packages of the extra is imported where it is used: verifying needs none."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import MissingDependencyError, OptionError
from converters.outputs.base import OpenInputs, OutputRequest, Progress, Shown, WriteOptions
from converters.outputs.checking import cannot_recompute, check_files, damaged_manifest, show_files
from converters.outputs.onnx.options import DEFAULT_OPSET, ExportOptions, Form
from converters.plans.merge import Plan

if TYPE_CHECKING:
    from converters.outputs.onnx.plan import ExportPlan
    from converters.outputs.onnx.write import ExportResult

_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def require_onnx() -> None:
    """Raise `MissingDependencyError` unless the packages of the extra are installed."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise MissingDependencyError(f"ONNX export needs {', '.join(missing)}: pip install 'peanut-serve[onnx]'")


class OnnxFormat:
    """See `base.Format`."""

    name = "onnx"

    def plan(self, plans: Sequence[Plan], request: OutputRequest) -> "ExportPlan":
        """Graphs of all tasks, by default in `./<adapter>-onnx`; of tasks in one folder in `./<base>-onnx`."""
        require_onnx()
        from converters.outputs.onnx.plan import plan_export

        options = _export_options(request)
        return plan_export(plans, request.output, options, overwrite=request.write.overwrite)

    def folders(self, planned: "ExportPlan") -> Sequence[Path]:
        """The folders of the tasks."""
        return list(planned.outputs)

    def write(self, planned: "ExportPlan", options: WriteOptions, progress: Progress) -> "ExportResult":
        """Write the graphs, check and measure them."""
        from converters.outputs.onnx.write import run_export

        with progress.steps() as report:
            return run_export(planned, overwrite=options.overwrite, report=report)

    def show(self, planned: "ExportPlan", result: "ExportResult | None") -> Shown:
        """The graphs of each task, how well they were checked, and their scores."""
        from converters.outputs.onnx.show import show_plan, show_result

        return show_plan(planned) if result is None else show_result(result)

    def verify(self, folder: Path, manifest: Mapping[str, Any], full: OpenInputs | None, progress: Progress) -> Shown:
        """Compare graphs, weights and adapter files with their hashes."""
        if full is not None:
            raise cannot_recompute(folder, "an ONNX export")
        files = manifest.get("files")
        if not isinstance(files, Mapping):
            raise damaged_manifest(folder, "no files in it")
        check_files(folder, files)
        return show_files(folder, files)


FORMAT = OnnxFormat()


def _export_options(request: OutputRequest) -> ExportOptions:
    own, write = request.own, request.write
    wanted = {
        Form.SHARED: write.share,
        Form.SWAPPABLE: own.get("swappable"),
        Form.SELF_MERGING: own.get("self_merging"),
    }
    forms = [form for form, is_wanted in wanted.items() if is_wanted]
    if len(forms) > 1:
        raise OptionError(
            "share=, swappable= and self_merging= are different forms; choose one (converters/README.md)"
        )
    return ExportOptions(
        form=forms[0] if forms else Form.MERGED,
        opset=own.get("opset", DEFAULT_OPSET),
        quantize=tuple(dict.fromkeys(own.get("quantize", ()))),
        transformersjs=own.get("transformersjs", False),
        eval_data=own.get("eval_data"),
        interpolate_pos_encoding=own.get("interpolate_pos_encoding", False),
        verify=write.verify,
        device=write.device,
    )
