"""ONNX exports beside PEFT's merge and torch's exporter: their time and bytes, and how fast the graphs run.

    make bench-onnx
    python benchmarks/onnx_export.py --part latency --runs 5
    python benchmarks/onnx_export.py --case vit-tiny --runs 1                    (a check of this script)

export: whole processes of `peanut-merge --format onnx`, and of PEFT and torch; and what a further task adds.
latency: the graphs and the merged model in torch, at batch 1 and 8, with two threads.
swap: from task to task in one session of the swappable graph.

Every row is added to build/bench/onnx.jsonl with the figures behind it; remove the file to begin anew.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it

from contenders import PYTHON, peft_onnx
from measure import Cost, machine, measure, median
from onnx_inputs import CASES, LABELS, WORK, Case, make_inputs
from onnx_latency import latencies, onnx_model, swaps, torch_model
from rich import box
from rich.console import Console
from rich.table import Table

RESULTS = WORK.parent / "onnx.jsonl"
PARTS = ("export", "latency", "swap")
PACKAGES = ("torch", "transformers", "peft", "onnx", "onnxruntime", "onnxscript")
OUTPUT, ASSETS = WORK / "output", WORK / "assets"
MERGED, SWAPPABLE, SELF_MERGING = "merged", "--swappable", "--self-merging"
FORMS = ("--share", SWAPPABLE, SELF_MERGING)
PEER = "PEFT and torch.onnx.export"


class Results:
    """What was measured: lines of JSON in a file, and rows of tables."""

    def __init__(self, about: dict[str, Any]) -> None:
        self._about = about
        self._tables: dict[str, Table] = {}

    def add(self, part: str, row: dict[str, str], figures: dict[str, Any]) -> None:
        """A row as it is shown, and the figures behind it."""
        if part not in self._tables:
            self._tables[part] = Table(*row, box=box.MARKDOWN)
        self._tables[part].add_row(*row.values())
        line = {"time": time.strftime("%FT%T"), **self._about, "part": part, **row, **figures}
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def show(self) -> None:
        """All tables, for benchmarks/README.md."""
        for part, table in self._tables.items():
            print(f"\n{part}:")
            Console(width=220).print(table)


@dataclass(frozen=True)
class Export:
    """One command: its options, how many tasks it exports, and whether the base was traced before."""

    options: tuple[str, ...]
    tasks: int = 1
    traced: bool = True

    @property
    def name(self) -> str:
        """As in the table."""
        return " ".join(self.options)


@dataclass(frozen=True)
class Outcome:
    """What one run cost and wrote; what peanut-merge itself says of it."""

    cost: Cost
    nbytes: int
    loading: float = 0.0
    writing: float = 0.0


ALONE = Export((PEER,), traced=False)
EXPORTS = (
    *(Export((MERGED, *check), traced=traced) for traced in (False, True) for check in ((), ("--no-verify",))),
    *(
        Export((form, "--no-verify"), tasks, traced)
        for form in FORMS
        for tasks, traced in ((1, False), (1, True), (len(LABELS), True))
    ),
)


def peanut_merge(case: Case, export: Export, output: Path, assets: Path) -> Outcome:
    """Run the command."""
    arguments: list[str | Path] = ["--base", case.base, "--format", "onnx", "-o", output, "--json"]
    for adapter in case.adapters[: export.tasks]:
        arguments += ["--adapter", adapter]
    arguments += [] if export.options[0] == MERGED else ["--each", export.options[0]]
    facts = output.with_suffix(".json")
    # exec: what is measured is the program and not the shell
    environment: list[str | Path] = ["env", f"HF_ASSETS_CACHE={assets}", "sh", "-c", 'exec "$@" > "$0"', facts]
    cost = measure([*environment, PYTHON.parent / "peanut-merge", *arguments, *export.options[1:]])
    told = json.loads(facts.read_text())
    return Outcome(cost, folder_bytes(output), told["loading_seconds"], sum(one["seconds"] for one in told["tasks"]))


def peer(case: Case, output: Path) -> Outcome:
    """What is done without us, for each task anew."""
    output.mkdir()
    cost = measure(peft_onnx(case.base, case.adapters[0], LABELS[0], output / "model.onnx"))
    return Outcome(cost, folder_bytes(output))


def run_exports(case: Case, runs: int) -> dict[Export, list[Outcome]]:
    """All commands, in turn; before that two runs that are not counted, which trace all and fill the page cache."""
    found: dict[Export, list[Outcome]] = {export: [] for export in (*EXPORTS, ALONE)}
    shutil.rmtree(ASSETS, ignore_errors=True)
    for form in (MERGED, SELF_MERGING):
        clear(OUTPUT)
        peanut_merge(case, Export((form,)), OUTPUT, ASSETS)
    for _ in range(runs):
        for export, outcomes in found.items():
            clear(OUTPUT)
            with tempfile.TemporaryDirectory() as empty:
                if export is ALONE:
                    outcomes.append(peer(case, OUTPUT))
                else:
                    outcomes.append(peanut_merge(case, export, OUTPUT, ASSETS if export.traced else Path(empty)))
    clear(OUTPUT)
    return found


def report_exports(found: dict[Export, list[Outcome]], results: Results) -> None:
    """A row for each command."""
    alone = median([one.cost for one in found[ALONE]]).wall
    for export, outcomes in found.items():
        cost = median([one.cost for one in outcomes])
        ours = export is not ALONE
        row = {"": export.name, "tasks": f"{export.tasks}"}
        row["cache"] = ("warm" if export.traced else "empty") if ours else "-"
        row |= {"wall": f"{cost.wall:.1f} s", "of PEFT's": f"{cost.wall / (alone * export.tasks):.2f}"}
        row |= {"CPU": f"{cost.cpu:.1f} s", "peak RSS": f"{cost.peak_rss:.0f} MB"}
        loading = statistics.median(one.loading for one in outcomes)
        writing = statistics.median(one.writing for one in outcomes)
        row["loading, tracing"] = f"{loading:.2f} s" if ours else "-"
        row["evaluating, writing"] = f"{writing:.2f} s" if ours else "-"
        row["written"] = f"{outcomes[0].nbytes / 1e6:.1f} MB"
        results.add("export", row, {"outcomes": [asdict(one) for one in outcomes]})


def report_further(case: Case, found: dict[Export, list[Outcome]], results: Results) -> None:
    """A row for each form: what a task adds to an export of one."""
    count = len(LABELS) - 1
    changed = sum(map(case.changed_bytes, case.adapters[1:])) / count
    alone = median([one.cost for one in found[ALONE]]).wall
    for form in FORMS:
        traced_now, first, several = (found[one] for one in EXPORTS if one.options[0] == form)
        walls = [(b.cost.wall - a.cost.wall) / count for a, b in zip(first, several, strict=True)]
        inside = [(b.writing - a.writing) / count for a, b in zip(first, several, strict=True)]
        wall, nbytes = statistics.median(walls), (several[0].nbytes - first[0].nbytes) / count
        row = {"": form, "a further task": f"{wall:.2f} s"}
        row["evaluating, writing"] = f"{statistics.median(inside):.2f} s"
        row["of the first's, cache empty"] = f"{wall / median([one.cost for one in traced_now]).wall:.3f}"
        row["cache warm"] = f"{wall / median([one.cost for one in first]).wall:.3f}"
        row["of PEFT's"] = f"{wall / alone:.3f}"
        row |= {"adds": f"{nbytes / 1e6:.2f} MB", "weights it changes": f"{changed / 1e6:.2f} MB"}
        row["beyond them, of the first's size"] = f"{(nbytes - changed) / first[0].nbytes:.4f}"
        row["all, of the first's size"] = f"{nbytes / first[0].nbytes:.4f}"
        results.add("further tasks", row, {"walls": walls, "inside": inside, "bytes": nbytes, "changed": changed})


def report_running(case: Case, parts: Sequence[str], precisions: Sequence[str], runs: int, results: Results) -> None:
    """Latencies and swaps, of exports that are made for them."""
    root = WORK / f"{case.name}-running"
    clear(root)
    root.mkdir(parents=True)
    quantize = [part for precision in precisions for part in ("--quantize", precision)]
    task, unchecked = case.adapters[0].name, "--no-verify"
    peanut_merge(case, Export((MERGED, *quantize)), root / "merged", ASSETS)
    for form in (SWAPPABLE, SELF_MERGING):
        tasks = len(LABELS) if form == SWAPPABLE else 1
        peanut_merge(case, Export((form, unchecked), tasks), root / form.strip("-"), ASSETS)
    peer(case, root / "peer")
    merge: list[str | Path] = [PYTHON.parent / "peanut-merge", "--base", case.base, "--adapter", case.adapters[0]]
    measure([*merge, "-o", root / "torch"])
    merged, swappable = root / "merged" / "model.onnx", root / "swappable" / "model.onnx"
    files = {"int8": "model_quantized.onnx", "fp16": "model_fp16.onnx"}
    contenders = [
        torch_model(root / "torch"),
        onnx_model(MERGED, merged),
        onnx_model("swappable, with its adapter", swappable, swappable.with_name(f"{task}.onnx_adapter")),
        onnx_model("self-merging", root / "self-merging" / f"{task}.onnx"),
        *(onnx_model(precision, merged.with_name(files[precision])) for precision in precisions),
        onnx_model(PEER, root / "peer" / "model.onnx"),
    ]
    if "latency" in parts:
        for row, figures in latencies(contenders, MERGED, case.image_shape, 3 * runs):
            results.add("latency", row, figures)
    if "swap" in parts:
        adapters = [swappable.with_name(f"{adapter.name}.onnx_adapter") for adapter in case.adapters]
        for row, figures in swaps(swappable, merged, adapters, case.image_shape, 10 * runs):
            results.add("swap", row, figures)
    clear(root)


def folder_bytes(folder: Path) -> int:
    """Of all files in it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def clear(folder: Path) -> None:
    """Remove a folder; what was written before it is on the disk afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def main() -> None:
    """Measure what is asked for, and print the tables that stand in benchmarks/README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="vit-base")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; again for more")
    parser.add_argument("--runs", type=int, default=5, help="of commands; three times that of graphs, ten of swaps")
    parser.add_argument("--quantize", nargs="*", choices=["int8", "fp16"], default=["int8", "fp16"])
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    case, parts = CASES[options.case], options.part or PARTS
    make_inputs(case)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    load = os.getloadavg()[0]  # torch with two threads takes ten times as long beside another busy process
    print(f"{case.name}: {machine()}, load {load:.1f}, {versions}; medians of {options.runs}", flush=True)
    about = {"case": case.name, "machine": machine(), "load": load, "versions": versions, "runs": options.runs}
    results = Results(about)
    try:
        if "export" in parts:
            found = run_exports(case, options.runs)
            report_exports(found, results)
            report_further(case, found, results)
        if {"latency", "swap"} & set(parts):
            report_running(case, parts, options.quantize, options.runs, results)
    finally:
        results.show()


if __name__ == "__main__":
    main()
