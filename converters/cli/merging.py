"""What `peanut-merge` does with its options: plan, write, upload, and print."""

from converters.api.options import MergeOptions, Sources
from converters.api.planning import plan_merges
from converters.cli.console import TerminalProgress, print_notes, print_shown
from converters.errors import OptionError
from converters.hub.download import hide_progress_bars
from converters.outputs.base import OutputRequest
from converters.outputs.table import FormatRow
from converters.outputs.upload import Push


def merge(
    row: FormatRow,
    sources: Sources,
    options: MergeOptions,
    request: OutputRequest,
    push: Push,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write an output in one of the formats; with `dry_run`, only show what would be written.

    Raises `PeanutError` of some kind; whichever it is, no output was written or changed.
    """
    if push.repo_id and request.each and not row.joins_outputs:
        raise OptionError("--push-to-hub takes one output, --each makes several; push each with: hf upload")
    plans = plan_merges(sources, options, each=request.each)
    print_notes([note for plan in plans for note in plan.notes])
    output_format = row.load()
    planned = output_format.plan(plans, request)
    folders = output_format.folders(planned)
    if push.repo_id and len(folders) > 1:
        raise OptionError("--push-to-hub takes one output, this makes several; push each with: hf upload")
    if dry_run:
        print_shown(output_format.show(planned, None), as_json)
        return
    push.prepare(plans)
    if sources.stream:
        hide_progress_bars()
    result = output_format.write(planned, request.write, TerminalProgress())
    print_shown(output_format.show(planned, result), as_json, push.upload(folders[0]))
