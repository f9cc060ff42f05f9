"""What the commands print: results on stdout, progress and everything else on stderr."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import progress
from rich.console import Console

from converters.cli.flags import in_flags
from converters.files.sizes import size_text as size_text  # also for the commands of peanut_serve
from converters.outputs.base import Advance, Report, Shown

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)


class TerminalProgress:
    """Progress on stderr; nothing if stderr is not a terminal."""

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Advance]:
        """A progress bar for `total` bytes."""
        with _bar(what, total, progress.DownloadColumn()) as advance:
            yield advance

    @contextmanager
    def counter(self, what: str, total: int) -> Iterator[Advance]:
        """A progress bar for `total` things."""
        with _bar(what, total, progress.MofNCompleteColumn()) as advance:
            yield advance

    @contextmanager
    def steps(self) -> Iterator[Report]:
        """A spinner with the step that is under way."""
        if not err.is_terminal:
            yield lambda step: None
            return
        with err.status("planning") as status:
            yield status.update


@contextmanager
def _bar(what: str, total: int, amounts: progress.ProgressColumn) -> Iterator[Advance]:
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        amounts,
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def print_notes(notes: Sequence[str]) -> None:
    """Notes for the user, each once."""
    for note in dict.fromkeys(notes):
        err.print(f"note: {in_flags(note)}", markup=False)


def print_shown(shown: Shown, as_json: bool, pushed_to: str | None = None) -> None:
    """A result, and where on the Hub it is."""
    if as_json:
        facts = shown.facts
        if pushed_to and isinstance(facts, dict):
            facts = {**facts, "pushed_to": pushed_to}
        print(json.dumps(facts, indent=2))
        return
    for line in shown.lines:
        out.print(in_flags(line), markup=False)
    if pushed_to:
        out.print(f"pushed to {pushed_to}", markup=False)
