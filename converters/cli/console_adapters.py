"""What `peanut-inspect` prints of an adapter: what it is, and where it acts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Column, Table

from converters.adapters.facts import shortened, split_module
from converters.cli.console import out
from converters.inspection.norms import DeltaNorm, norm_table


def print_facts(facts: dict[str, Any]) -> None:
    """The facts of an adapter, one per line."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        shown = (
            ", ".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if key == "parameters" else value
        )
        table.add_row(key.replace("_", " "), "-" if shown in (None, "") else str(shown))
    out.print(table)


def print_methods(methods: dict[str, dict[str, Any]]) -> None:
    """What each module does to its weight: one line for all modules that differ only in their layer."""
    kinds = {module: split_module(module)[1] for module in methods}
    short = shortened(set(kinds.values()))
    groups: Counter[tuple[str, str]] = Counter()
    for module, facts in methods.items():
        exact, reason = f"exact rank {facts['rank']}", facts["full_rank_reason"]
        exact += " of each expert" if facts["rank_of_each_expert"] else ""
        says = [
            f"{facts['method']}{' of weight and bias' if facts['changes_bias'] else ''}",
            f"reads of W0: {facts['reads']}",
            exact if reason is None else f"no exact rank: the update {reason}",
            ", ".join(f"{name} = {_short(value)}" for name, value in facts["settings"].items()),
        ]
        groups[(short[kinds[module]], "; ".join(filter(None, says)))] += 1
    out.print("what each module does")
    for (kind, line), layers in groups.items():
        out.print(f"  {kind} ({layers} layer{'s' if layers > 1 else ''}): {line}", markup=False)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def print_shapes(shapes: dict[str, dict[str, Any]]) -> None:
    """Shapes of θ: one row for all modules that differ only in their layer and have the same shapes."""
    kinds = {module: split_module(module)[1] for module in shapes}
    short = shortened(set(kinds.values()))
    columns = list(dict.fromkeys(key for facts in shapes.values() for key in facts if key != "scaling"))
    groups: Counter[tuple[str, ...]] = Counter()
    for module, facts in shapes.items():
        groups[(short[kinds[module]], *(str(facts.get(key, "-")) for key in columns))] += 1
    table = Table("module", *columns, "layers", title="shapes of θ")
    for row, times in groups.items():
        table.add_row(*row, str(times))
    out.print(table)


def print_norms(norms: Sequence[DeltaNorm]) -> None:
    """The size of each update relative to its weight: one row per layer, one column per kind of module."""
    layers, kinds, cells = norm_table(norms)
    table = Table(*(Column(name, overflow="fold") for name in ("layer", *kinds)), title="size of |f(W0)| / |W0|")
    for layer in layers:
        row = cells[layer]
        table.add_row(layer, *(f"{row[kind]:.4f}" if kind in row else "-" for kind in kinds))
    table.add_section()
    columns = [[row[kind] for row in cells.values() if kind in row] for kind in kinds]
    table.add_row("mean", *(f"{sum(column) / len(column):.4f}" for column in columns))
    out.print(table)
