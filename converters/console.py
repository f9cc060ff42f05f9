"""What the commands show: results on stdout, progress and the rest on stderr."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Table

from converters.executor import MergeResult
from converters.inspection import DeltaNorm
from converters.plan import Plan

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)


class Progress:
    """A progress bar on stderr, nothing where stderr is no terminal."""

    def __init__(self, total: int, what: str, as_bytes: bool) -> None:
        middle = [progress.DownloadColumn()] if as_bytes else [progress.MofNCompleteColumn()]
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            *middle,
            progress.TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._bar.start()
        return lambda amount: self._bar.advance(self._task, amount)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def print_plan(plan: Plan, target: Path, as_json: bool) -> None:
    """What a merge would write."""
    counts = Counter(tensor.action.value for tensor in plan.tensors)
    shards = {shard: sum(tensor.nbytes for tensor in tensors) for shard, tensors in plan.shards.items()}
    if as_json:
        actions = {tensor.name: tensor.action.value for tensor in plan.tensors}
        print(json.dumps({
            "output": str(target), "total_size": plan.total_size, "shards": shards, "counts": counts,
            "tensors": actions, "dropped": dict(plan.dropped), "notes": plan.notes, "dry_run": True,
        }, indent=2))  # fmt: skip
        return
    out.print(f"would write {target}: {_size(plan.total_size)}", markup=False)
    for shard, size in shards.items():
        out.print(f"  {shard}  {_size(size)}", markup=False)
    out.print("  " + ", ".join(f"{n} {action}" for action, n in sorted(counts.items())))
    for name, reason in plan.dropped.items():
        out.print(f"  left out: {name} ({reason})", markup=False)


def print_result(result: MergeResult, as_json: bool) -> None:
    """What a merge wrote, and how well it was checked."""
    counts = Counter(tensor.action.value for tensor in result.plan.tensors)
    checked = result.verification
    if as_json:
        print(json.dumps({
            "output": str(result.output), "total_size": result.plan.total_size, "counts": counts,
            "dropped": dict(result.plan.dropped), "notes": result.plan.notes, "seconds": round(result.seconds, 3),
            "adapter_digest": result.plan.adapter.digest, "base_fingerprint": result.plan.base.fingerprint,
            "verification": checked.summary() if checked else None,
        }, indent=2))  # fmt: skip
        return
    out.print(f"wrote {result.output}: {_size(result.plan.total_size)} in {result.seconds:.1f} s", markup=False)
    out.print("  " + ", ".join(f"{n} {action}" for action, n in sorted(counts.items())))
    if checked:
        out.print(
            f"  verified: {checked.tensors} tensors, {checked.recomputed} numbers recomputed in float64, "
            f"largest error {checked.max_ulp:.3f} ulp"
        )


def print_facts(facts: dict[str, Any]) -> None:
    """The facts of an adapter, a line each."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        shown = (
            ", ".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if key == "parameters" else value
        )
        table.add_row(key.replace("_", " "), "-" if shown in (None, "") else str(shown))
    out.print(table)


def print_norms(norms: Sequence[DeltaNorm]) -> None:
    """The size of each update relative to its weight: a row a layer, a column a kind of module."""
    cells: dict[str, dict[str, float]] = {}
    for norm in norms:
        found = re.match(r"(.*\.\d+)\.(.+)", norm.module)  # up to the last number: model.layers.3
        layer, kind = found.groups() if found else ("", norm.module)
        cells.setdefault(layer, {})[kind] = norm.relative
    kinds = sorted({kind for row in cells.values() for kind in row})
    short = [kind.rsplit(".", 1)[-1] for kind in kinds]
    headers = short if len(set(short)) == len(kinds) else kinds
    table = Table("|f(W0)| / |W0|", *headers, title="size of the update")
    for layer, row in cells.items():
        table.add_row(layer, *(f"{row[kind]:.4f}" if kind in row else "-" for kind in kinds))
    table.add_section()
    columns = [[row[kind] for row in cells.values() if kind in row] for kind in kinds]
    table.add_row("mean", *(f"{sum(column) / len(column):.4f}" for column in columns))
    out.print(table)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
