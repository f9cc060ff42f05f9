"""Exporting to ONNX in one call: open, plan, write."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.opening import AdapterSpec
from converters.api.options import MergeOptions, Sources
from converters.api.planning import plan_merges
from converters.outputs.onnx.format import require_onnx
from converters.outputs.onnx.options import ExportOptions

if TYPE_CHECKING:
    from converters.outputs.onnx.write import ExportResult


def export_onnx(
    base: str | Path,
    adapter: AdapterSpec | Sequence[AdapterSpec],
    output: str | Path | None = None,
    *,
    each: bool = False,
    options: ExportOptions | None = None,
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
        output: folder to write: `./<adapter>-onnx` by default, `./<base>-onnx` for tasks that share a folder. For
            several tasks in the form MERGED, the folder that holds theirs.
        each: every adapter is a task of its own; otherwise all of them are summed.
        options: what to write; by default one graph with merged weights, verified.
        overwrite: replace outputs of earlier exports.

    Raises:
        PeanutError: see `converters.errors`; whichever it is, no output was written or changed.
    """
    require_onnx()
    from converters.outputs.onnx.plan import plan_export
    from converters.outputs.onnx.write import run_export

    sources = Sources(base, adapter, revision, adapter_revision, token, layout, scaling)
    plans = plan_merges(sources, MergeOptions("fp32", labels=labels, force_base=force_base), each=each)
    folder = None if output is None else Path(output)
    planned = plan_export(plans, folder, options or ExportOptions(), overwrite=overwrite)
    return run_export(planned, overwrite=overwrite)
