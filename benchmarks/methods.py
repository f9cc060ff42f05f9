"""peanut-merge beside PEFT's merge_and_unload, on an adapter of every method, of a random Llama of 1.1B parameters.

    python benchmarks/methods.py                         (one run each: hours, as some methods of PEFT take long)
    python benchmarks/methods.py --only loha osf --runs 3
    python benchmarks/methods.py --layers 1              (of its 22 layers)

Each is a whole process, with warm files; PEFT's neither verifies nor syncs what it writes.
"""

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from contenders import Case, interpreter, peanut_merge, peft
from make_inputs import LLAMA_1B, make_base
from measure import Cost, machine, measure, median
from method_adapters import ROWS

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "bench"
MAKE_ADAPTER = Path(__file__).with_name("method_adapters.py")


def read(folder: Path) -> None:
    """Bring the files of a folder into the page cache."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb", buffering=0) as opened:
            while opened.read(16 << 20):
                pass


def compare(case: Case, runs: int) -> dict[str, Cost]:
    """The medians of both, which take turns."""
    costs: dict[str, list[Cost]] = {"peanut-merge": [], "PEFT": []}
    output = WORK / "output"
    for _ in range(runs):
        for name, command in (("peanut-merge", peanut_merge), ("PEFT", peft)):
            shutil.rmtree(output, ignore_errors=True)
            read(case.base)
            read(case.adapter)
            costs[name].append(measure(command(case, output)))
    shutil.rmtree(output, ignore_errors=True)
    return {name: median(several) for name, several in costs.items()}


def main() -> None:
    """Measure, and print the table that stands in benchmarks/README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="METHOD", help="default: all")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--layers", type=int, default=LLAMA_1B.num_hidden_layers, help="of the model")
    options = parser.parse_args()
    base = WORK / ("llama-1.1b" if options.layers == LLAMA_1B.num_hidden_layers else f"llama-{options.layers}-layers")
    LLAMA_1B.num_hidden_layers = options.layers
    make_base(LLAMA_1B, base)
    start = measure(interpreter())
    print(f"{machine()}; {options.layers} layers, {options.runs} runs; `import torch` alone: {start.wall:.1f} s\n")
    print("| method | peanut-merge | PEFT | of PEFT's time | peak RSS | PEFT's | of PEFT's |")
    print("|---|---|---|---|---|---|---|")
    case = Case("random 1.1B", base, WORK / "adapter-method", "bfloat16", options.layers)
    for name in options.only or ROWS:
        shutil.rmtree(case.adapter, ignore_errors=True)
        subprocess.run([sys.executable, MAKE_ADAPTER, name, base, case.adapter], check=True)
        ours, theirs = compare(replace(case, name=name), options.runs).values()
        time, memory = ours.wall / theirs.wall, ours.peak_rss / theirs.peak_rss
        row = (f"{ours.wall:.1f} s", f"{theirs.wall:.1f} s", f"{time:.2f}", f"{ours.peak_rss:.0f} MB",
               f"{theirs.peak_rss:.0f} MB", f"{memory:.2f}")  # fmt: skip
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    shutil.rmtree(case.adapter, ignore_errors=True)


if __name__ == "__main__":
    main()
