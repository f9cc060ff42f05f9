"""peanut-merge beside PEFT's merge, side by side in one run: time and memory of the whole process.

    make bench            (SmolLM2-135M and a random Llama of 1.1B parameters, 5 counted runs each)

The runs alternate, after one that is not counted, with a warm page cache. Ours verifies and syncs its output;
PEFT's does neither.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from measure import Cost, machine, measure, median

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "bench"
SMOLLM2 = ROOT / "build" / "bases" / "smollm2-135m-instruct"
RUNS = 5
CASES = {
    "SmolLM2-135M": (SMOLLM2, WORK / "adapter-135m"),
    "random Llama 1.1B": (WORK / "llama-1.1b", WORK / "adapter-1.1b"),
}

PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


def compare(base: Path, adapter: Path) -> tuple[Cost, Cost]:
    """Medians of (ours, PEFT's)."""
    python = Path(sys.executable)
    ours, peft = WORK / "ours", WORK / "peft"
    commands = {
        ours: [python.parent / "peanut-merge", "--base", base, "--adapter", adapter, "-o", ours],
        peft: [python, "-c", PEFT, base, adapter, peft],
    }
    costs: dict[Path, list[Cost]] = {ours: [], peft: []}
    for _ in range(RUNS + 1):
        for output, command in commands.items():
            shutil.rmtree(output, ignore_errors=True)
            costs[output].append(measure(command))
    for output in commands:
        shutil.rmtree(output)
    return median(costs[ours][1:]), median(costs[peft][1:])


def main() -> None:
    """Print the table that stands in benchmarks/README.md."""
    # in a process of its own: a large parent would show up in the peak of its children
    subprocess.run([sys.executable, Path(__file__).with_name("make_inputs.py"), SMOLLM2, WORK], check=True)
    print(f"{machine()}, {RUNS} runs each, medians\n")
    print("| model | | wall | CPU | peak RSS | peak anonymous |")
    print("|---|---|---|---|---|---|")
    for name, (base, adapter) in CASES.items():
        ours, peft = compare(base, adapter)
        for who, cost in (("peanut-merge", ours), ("PEFT", peft)):
            print(
                f"| {name} | {who} | {cost.wall:.1f} s | {cost.cpu:.1f} s | {cost.peak_rss:.0f} MB "
                f"| {cost.peak_anonymous:.0f} MB |"
            )
        ratios = [getattr(ours, f) / getattr(peft, f) for f in Cost.__dataclass_fields__]
        print(f"| {name} | **ratio** | " + " | ".join(f"**{ratio:.2f}**" for ratio in ratios) + " |", flush=True)


if __name__ == "__main__":
    main()
