"""What the commands show of adapters: what one is, where it acts, and what it was written as."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Column, Table

from converters.adapters.facts import shortened, split_module
from converters.cli.console import out, print_pushed, pushed_facts, size_text
from converters.evaluation.verify import FactorCheck
from converters.inspection.norms import DeltaNorm, norm_table
from converters.outputs.lora import VLLM_RANKS, LoraAdapterPlan
from converters.outputs.peft import PeftAdapterPlan


def print_peft_adapter(
    converted: PeftAdapterPlan, dry_run: bool, as_json: bool, pushed_to: str | None = None
) -> None:
    """What was, or would be, written as a PEFT adapter, and where on the Hub it is."""
    whole: list[str] = converted.config["modules_to_save"] or []
    counts = {"modules": len(converted.modules), "modules_to_save": whole}
    settings = {key: converted.config[key] for key in ("r", "depth", "act_fn", "scaling")}
    if as_json:
        facts = {"output": str(converted.output), **counts, **settings, "notes": converted.plan.notes}
        print(json.dumps({**facts, **pushed_facts(pushed_to), **({"dry_run": True} if dry_run else {})}, indent=2))
        return
    shown = ", ".join(f"{key} = {value}" for key, value in settings.items())
    out.print(
        f"{'would write' if dry_run else 'wrote'} {converted.output}: an HF PEFT adapter, {shown}", markup=False
    )
    out.print(f"  {len(converted.modules)} modules, whole: {', '.join(whole) or 'none'}", markup=False)
    print_pushed(pushed_to)


def print_lora_adapter(
    converted: LoraAdapterPlan, check: FactorCheck | None, as_json: bool, pushed_to: str | None = None
) -> None:
    """What was written as a LoRA adapter, or would be (no `check`), and how to serve it."""
    whole: list[str] = converted.config["modules_to_save"] or []
    facts = {
        "output": str(converted.output),
        "modules": len(converted.modules),
        "modules_to_save": whole,
        "r": converted.r,
        "dtype": converted.dtype,
        "max_lora_rank": converted.max_lora_rank,
    }
    if as_json:
        done = {"verification": asdict(check)} if check else {"dry_run": True}
        notes = {"notes": converted.plan.notes}
        print(json.dumps({**facts, **notes, **done, **pushed_facts(pushed_to)}, indent=2))
        return
    ranks = sorted({converted.config["r"], *converted.config["rank_pattern"].values()})
    out.print(
        f"{'wrote' if check else 'would write'} {converted.output}: a LoRA adapter, "
        f"r = {', '.join(map(str, ranks))}, {converted.dtype}, {size_text(converted.nbytes)}",
        markup=False,
    )
    out.print(f"  {len(converted.modules)} modules, whole: {', '.join(whole) or 'none'}", markup=False)
    if check:
        out.print(
            f"  verified: {check.recomputed} numbers of the deltas recomputed in float64, largest error "
            f"{check.max_error:.1e} of the largest delta"
        )
    if converted.max_lora_rank is None:
        out.print(f"  vLLM serves ranks up to {VLLM_RANKS[-1]}, not {converted.r}: merge it for vLLM")
    else:
        name = shlex.quote(f"{converted.output.name}={converted.output}")
        out.print(
            f"  vllm serve {converted.plan.base.repo_id or converted.plan.base.folder} --enable-lora "
            f"--max-lora-rank {converted.max_lora_rank} --lora-modules {name}",
            markup=False,
        )
    print_pushed(pushed_to)


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
    columns = list(dict.fromkeys(key for facts in shapes.values() for key in facts if key != "scaling"))
    groups: Counter[tuple[str, ...]] = Counter()
    for module, facts in shapes.items():
        groups[(short[kinds[module]], *(str(facts.get(key, "-")) for key in columns))] += 1
    table = Table("module", *columns, "layers", title="shapes of θ")
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
