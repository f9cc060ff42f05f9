"""What an export writes, and where. Everything that can be refused before a model is loaded is refused here."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.errors import ConversionError, OptionError
from converters.evaluation.factors import refuse_parts
from converters.evaluation.worker import find_devices
from converters.files.staging import check_output, check_space
from converters.models import config as model_config
from converters.outputs.onnx.eval_data import EvalData, read_eval_data
from converters.outputs.onnx.graphs.merged import BASE_DATA
from converters.outputs.onnx.graphs.template_cache import graph_config
from converters.outputs.onnx.kind import kind_of
from converters.outputs.onnx.opset import check_opset
from converters.outputs.onnx.options import ExportOptions, Form
from converters.outputs.onnx.shapes import example_shape
from converters.plans.merge import Plan

# precision -> name of its graph (https://huggingface.co/docs/transformers.js/guides/dtypes)
MODEL_FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
_BASE = BASE_DATA.removesuffix(".onnx_data")
_MOST_NAME_BYTES = 255 - len(".onnx_adapter")  # each task has a file of its name
_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """An export that can be carried out.

    Attributes:
        outputs: folder -> the tasks in it.
        options: what was chosen.
        shapes: folder -> shape of the images or spectrograms that its graphs take; None for inputs of any length.
        eval_data: for the only task.
    """

    outputs: Mapping[Path, tuple[Plan, ...]]
    options: ExportOptions
    shapes: Mapping[Path, tuple[int, ...] | None]
    eval_data: EvalData | None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """All tasks."""
        return tuple(plan for plans in self.outputs.values() for plan in plans)

    @property
    def sizes(self) -> dict[Path, int]:
        """Upper bound of the bytes in each folder."""
        per_number = sum(_BYTES[precision] for precision in ("fp32", *self.options.quantize)) / 4
        total = max if self.options.form is Form.SWAPPABLE else sum  # one graph for all
        return {
            folder: int(per_number * total(plan.total_size for plan in plans))
            for folder, plans in self.outputs.items()
        }


def plan_export(
    plans: Sequence[Plan], output: Path | None, options: ExportOptions, *, overwrite: bool = False
) -> ExportPlan:
    """Plan to export tasks of one base.

    Args:
        plans: a planned merge in float32 for each.
        output: the folder; for several tasks in the form MERGED, the folder that holds theirs.
        options: what to write.
        overwrite: replace earlier outputs.

    Raises:
        ConversionError: the model cannot be exported, or not in that form.
        OptionError: an option does not apply here; the eval data does not match the labels.
        OutputError: the output exists, or there is no room for it.
    """
    kinds = [kind_of(plan) for plan in plans]
    for plan in plans:
        refuse_parts(plan, "ONNX")
    _check_options(plans, options)
    check_opset(options.opset)
    find_devices(options.device)
    outputs = _name_outputs(plans, output, options.form)
    eval_data = None
    if options.eval_data is not None:
        eval_data = read_eval_data(options.eval_data, kinds[0], model_config.labels_of(plans[0].config) or [])
    interpolates = options.interpolate_pos_encoding
    shapes = {folder: example_shape(tasks[0], kind_of(tasks[0]), interpolates) for folder, tasks in outputs.items()}
    planned = ExportPlan(outputs, options, shapes, eval_data)
    inputs = [plans[0].base.folder, *(weighted.adapter.path for plan in plans for weighted in plan.adapters)]
    for folder in outputs:
        check_output(folder, overwrite, inputs)
    check_space(planned.sizes)
    return planned


def _check_options(plans: Sequence[Plan], options: ExportOptions) -> None:
    if unknown := sorted(set(options.quantize) - (set(MODEL_FILES) - {"fp32"})):
        raise OptionError(f"quantize={unknown[0]!r} is unknown; expected int8 or fp16")
    if options.form is not Form.MERGED:
        for name in ("quantize", "transformersjs"):
            if getattr(options, name):
                raise OptionError(
                    f"{name}= is for graphs with merged weights of their own, not for {options.form.value} ones"
                )
        classes = {plan.config["architectures"][0]: plan.name for plan in plans}
        if len(classes) > 1:
            found = ", ".join(f"{task} is a {name}" for name, task in classes.items())
            raise ConversionError(f"tasks in one folder must be of one class: {found}; export them separately")
        _refuse_other_graphs(plans)
    if options.eval_data is not None and len(plans) > 1:
        raise OptionError("eval_data= measures one task, but several are exported; export them one by one")
    if options.eval_data is not None and plans[0].config.get("problem_type") == "multi_label_classification":
        raise OptionError("eval_data= has one label for each example, but this model gives several (multi-label)")
    for plan in plans:
        if (dtype := plan.options["dtype"]) != "fp32":
            raise OptionError(f"{plan.name}: ONNX graphs are written in float32, not {dtype}; see quantize=")


def _refuse_other_graphs(plans: Sequence[Plan]) -> None:
    """Raise `ConversionError` unless one graph is that of all tasks: its ties, sizes and pad token are in it."""
    first, *others = plans
    own = graph_config(first.config)
    for other in others:
        found = graph_config(other.config)
        for key in sorted(own.keys() | found.keys()):
            if own.get(key) != found.get(key):
                raise ConversionError(
                    f"tasks in one folder share a graph, and {key} is {found.get(key)} for {other.name}, "
                    f"{own.get(key)} for {first.name}; export them separately"
                )


def _name_outputs(plans: Sequence[Plan], output: Path | None, form: Form) -> dict[Path, tuple[Plan, ...]]:
    if form is not Form.MERGED:
        names = [plan.name for plan in plans]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise OptionError(f"two adapters are called {twice}; rename one of the folders")
        if too_long := next((name for name in names if len(os.fsencode(name)) > _MOST_NAME_BYTES), None):
            raise OptionError(
                f"{too_long[:40]}... is too long for the names of its files (at most {_MOST_NAME_BYTES} bytes); "
                "rename the folder of the adapter"
            )
        if _BASE in names:
            raise OptionError(
                f"an adapter is called {_BASE}, as is the file of the base's weights; rename its folder"
            )
        return {output or Path(f"{plans[0].base.name}-onnx"): tuple(plans)}
    if len(plans) == 1:
        return {output or Path(f"{plans[0].name}-onnx"): (plans[0],)}
    outputs: dict[Path, tuple[Plan, ...]] = {}
    for plan in plans:
        folder = output / plan.name if output is not None else Path(f"{plan.name}-onnx")
        if folder in outputs:
            raise OptionError(f"two adapters would be written to {folder}; rename one of their folders")
        outputs[folder] = (plan,)
    return outputs
