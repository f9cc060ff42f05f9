"""Exporting to ONNX in one call: open, plan, carry out."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.opening import AdapterSpec
from converters.api.merging import prepare_each, prepare_merge
from converters.errors import MissingDependencyError

if TYPE_CHECKING:
    from converters.outputs.onnx.plan import ExportOptions
    from converters.outputs.onnx.write import ExportResult

_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def require_onnx() -> None:
    """Raise `MissingDependencyError` unless the packages of the extra are there."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise MissingDependencyError(f"ONNX export needs {', '.join(missing)}: pip install 'peanut-serve[onnx]'")


def export_onnx(
    base: str | Path,
    adapter: AdapterSpec | Sequence[AdapterSpec],
    output: str | Path | None = None,
    *,
    each: bool = False,
    options: "ExportOptions | None" = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    token: str | None = None,
    layout: str | None = None,
    scaling: float | None = None,
    labels: list[str] | None = None,
    overwrite: bool = False,
    force_base: bool = False,
) -> "ExportResult":
    """Export adapted models as ONNX graphs, in float32.

    Args:
        base, adapter, revision, adapter_revision, token, layout, scaling, labels, force_base: as for
            `converters.merge`.
        output: folder to write; see `converters.onnx_export.export_plan.plan_export`.
        each: every adapter is a task of its own; else all of them are summed.
        options: what to write; by default one graph with merged weights, verified.
        overwrite: replace outputs of earlier exports.

    Raises:
        PeanutError: see `converters.errors`; whichever it is, no output was written or changed.
    """
    require_onnx()
    from converters.outputs.onnx.plan import ExportOptions, plan_export
    from converters.outputs.onnx.write import run_export

    prepare = prepare_each if each else prepare_merge
    prepared = prepare(
        base, adapter, revision=revision, adapter_revision=adapter_revision, token=token, layout=layout,
        scaling=scaling, dtype="fp32", labels=labels, force_base=force_base,
    )  # fmt: skip
    plans = prepared if isinstance(prepared, list) else [prepared]
    folder = None if output is None else Path(output)
    planned = plan_export(plans, folder, options or ExportOptions(), overwrite=overwrite)
    return run_export(planned, overwrite=overwrite)
