"""What the commands show: results on stdout, progress and the rest on stderr."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Column, Table

from converters.description import shortened, split_module
from converters.executor import MergeResult
from converters.inspection import DeltaNorm, norm_table
from converters.peft_adapter import PeftAdapterPlan
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
            "adapter_digests": [weighted.adapter.digest for weighted in result.plan.adapters],
            "base_fingerprint": result.plan.base.fingerprint,
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


def print_peft_adapter(converted: PeftAdapterPlan, dry_run: bool, as_json: bool) -> None:
    """What was, or would be, written as a PEFT adapter."""
    whole: list[str] = converted.config["modules_to_save"] or []
    counts = {"modules": len(converted.modules), "modules_to_save": whole}
    settings = {key: converted.config[key] for key in ("r", "depth", "act_fn", "scaling")}
    if as_json:
        facts = {"output": str(converted.output), **counts, **settings, "notes": converted.plan.notes}
        print(json.dumps({**facts, **({"dry_run": True} if dry_run else {})}, indent=2))
        return
    shown = ", ".join(f"{key} = {value}" for key, value in settings.items())
    out.print(
        f"{'would write' if dry_run else 'wrote'} {converted.output}: an HF PEFT adapter, {shown}", markup=False
    )
    out.print(f"  {len(converted.modules)} modules, whole: {', '.join(whole) or 'none'}", markup=False)


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


def print_shapes(shapes: dict[str, dict[str, Any]]) -> None:
    """Shapes of θ: a row for the modules that differ in their layer alone and have the same."""
    kinds = {module: split_module(module)[1] for module in shapes}
    short = shortened(set(kinds.values()))
    groups: Counter[tuple[str, ...]] = Counter()
    for module, facts in shapes.items():
        groups[(short[kinds[module]], *(str(facts[key]) for key in ("A", "B", "r", "depth")))] += 1
    table = Table("module", "A", "B", "r", "depth", "layers", title="shapes of θ")
    for row, times in groups.items():
        table.add_row(*row, str(times))
    out.print(table)


def print_norms(norms: Sequence[DeltaNorm]) -> None:
    """The size of each update relative to its weight: a row a layer, a column a kind of module."""
    layers, kinds, cells = norm_table(norms)
    table = Table(*(Column(name, overflow="fold") for name in ("layer", *kinds)), title="size of |f(W0)| / |W0|")
    for layer in layers:
        row = cells[layer]
        table.add_row(layer, *(f"{row[kind]:.4f}" if kind in row else "-" for kind in kinds))
    table.add_section()
    columns = [[row[kind] for row in cells.values() if kind in row] for kind in kinds]
    table.add_row("mean", *(f"{sum(column) / len(column):.4f}" for column in columns))
    out.print(table)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
