"""peanut-merge beside `cp -r` + fsync, PEFT's merge and mergekit: time and memory of whole processes.

    make bench-merge                                     (all cases: about 25 minutes and 45 GB of disk)
    python benchmarks/merge.py --case 1.1B --cache warm --runs 3

Every run is added to build/bench/results.jsonl, from which the picture is drawn; remove it to begin anew.

The contenders take turns. Before a cold run the base and the adapter are dropped from the page cache, before a warm
one they are read; what earlier runs wrote is synced before the next begins.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

from contenders import Case, copy, interpreter, mergekit, peanut_merge, peft
from measure import Cost, machine, measure, median
from plot_merge import plot

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "bench"
RESULTS = WORK / "results.jsonl"
CASES = {
    "135M": Case(
        "SmolLM2-135M, r=32",
        ROOT / "build" / "bases" / "smollm2-135m-instruct",
        WORK / "adapter-135m",
        "bfloat16",
        30,
    ),
    "1.1B": Case("random 1.1B, r=32", WORK / "llama-1.1b", WORK / "adapter-1.1b", "bfloat16", 22),
    "7B-r32": Case("random 7B, r=32", WORK / "llama-7b", WORK / "adapter-7b-r32", "float16", 32),
    "7B-r64": Case("random 7B, r=64", WORK / "llama-7b", WORK / "adapter-7b-r64", "float16", 32),
}
Command = Callable[[Case, Path], list[str | Path]]


def prepare(case: Case, cache: str) -> None:
    """Bring the page cache into the state a run begins with."""
    os.sync()
    for file in [*case.base.iterdir(), *case.adapter.iterdir()]:
        with file.open("rb", buffering=0) as opened:
            if cache == "cold":
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(16 << 20):
                    pass


def run(case: Case, cache: str, contenders: dict[str, Command], runs: int) -> dict[str, list[Cost]]:
    """The costs of all contenders, in turn; every run is noted as it ends."""
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    output = WORK / "output"
    for _ in range(runs):
        for name, command in contenders.items():
            shutil.rmtree(output, ignore_errors=True)
            prepare(case, cache)
            cost = measure(command(case, output))
            costs[name].append(cost)
            with RESULTS.open("a") as file:
                size = sum(path.stat().st_size for path in case.base.glob("*.safetensors"))
                entry = {"case": case.name, "bytes": size, "cache": cache, "contender": name, **asdict(cost)}
                file.write(json.dumps(entry) + "\n")
    shutil.rmtree(output, ignore_errors=True)
    return costs


def table(case: Case, cache: str, costs: dict[str, list[Cost]]) -> str:
    """Markdown rows: medians, and the wall time relative to the copy's and to PEFT's."""
    medians = {name: median(several) for name, several in costs.items()}
    rows = []
    for name, cost in medians.items():
        ratios = [f"{cost.wall / medians[peer].wall:.2f}" if peer in medians else "-" for peer in ("copy", "PEFT")]
        rows.append(
            f"| {case.name} | {cache} | {name} | {cost.wall:.1f} s | {ratios[0]} | {ratios[1]} | {cost.cpu:.1f} s "
            f"| {cost.peak_rss:.0f} MB | {cost.peak_anonymous:.0f} MB |"
        )
    return "\n".join(rows)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--cache", action="append", choices=["warm", "cold"], help="default: both")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peft-7b", action="store_true", help="PEFT on 7B, too: it needs memory for the model")
    parser.add_argument("--mergekit", help="path of mergekit-yaml in an environment of its own")
    parser.add_argument("--keep", action="store_true", help="keep the 7B inputs")
    return parser.parse_args()


def main() -> None:
    """Measure, and print the table that stands in benchmarks/README.md."""
    options = parse()
    cases = options.case or list(CASES)
    large = any(case.startswith("7B") for case in cases)
    if large and shutil.disk_usage(ROOT).free < 45e9 and not (WORK / "llama-7b" / "config.json").exists():
        sys.exit("the 7B cases need 45 GB of free disk; leave them out with --case 135M --case 1.1B")
    # in a process of its own: a large parent would show up in the peak of its children
    make = [sys.executable, Path(__file__).with_name("make_inputs.py"), WORK, *(["--7b"] if large else [])]
    subprocess.run(make, check=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    start = median([measure(interpreter()) for _ in range(options.runs + 1)][1:])
    print(f"{machine()}, {versions}; {options.runs} runs each, medians")
    print(f"python -c 'import torch': {start.wall:.1f} s, {start.peak_anonymous:.0f} MB anonymous\n")
    print("| | page cache | | wall | of the copy's | of PEFT's | CPU | peak RSS | peak anonymous |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in cases:
        contenders: dict[str, Command] = {"copy": copy, "peanut-merge": peanut_merge}
        if options.peft_7b or not name.startswith("7B"):
            contenders["PEFT"] = peft
        if options.mergekit:
            contenders["mergekit (no PEANuT)"] = partial(mergekit, options.mergekit)
        for cache in options.cache or ["warm", "cold"]:
            print(table(CASES[name], cache, run(CASES[name], cache, contenders, options.runs)), flush=True)
    plot(RESULTS, Path(__file__).with_suffix(".png"))
    if large and not options.keep:
        for path in WORK.glob("*-7b*"):
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
