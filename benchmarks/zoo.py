"""Every architecture of transformers that builds small, with PEFT's defaults: is what is merged right?

    python benchmarks/zoo.py                             (all tasks: about an hour)
    python benchmarks/zoo.py --task causal --type llama gpt2

Each type is examined in a process of its own. Outcomes are appended to build/bench/zoo.jsonl; types in it are not
examined again.
"""

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import transformers  # noqa: E402
from support.sweep.specimens import TASKS, Outcome, examine  # noqa: E402

LOG = ROOT / "build" / "bench" / "zoo.jsonl"
LONGEST = 120  # seconds for one type


def main() -> None:
    """Run the sweep that the command line asks for, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--type", nargs="+", help="only these model types")
    parser.add_argument("--log", type=Path, default=LOG)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    options.log.parent.mkdir(parents=True, exist_ok=True)
    options.log.touch()
    known = read(options.log)
    for task in options.task:
        for model_type in options.type or TASKS[task].model_types:
            if (task, model_type) not in known:
                outcome = examine_apart(task, model_type)
                row = {"task": task, "type": model_type, "kind": outcome.kind, "sentence": outcome.sentence}
                with options.log.open("a") as log:
                    log.write(json.dumps(row) + "\n")
    print(table(read(options.log)))


def read(log: Path) -> dict[tuple[str, str], Outcome]:
    """(task, type) -> outcome."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return {(row["task"], row["type"]): Outcome(row["kind"], row["sentence"]) for row in rows}


def examine_apart(task: str, model_type: str) -> Outcome:
    """`examine` in a child process, so that no model can end the sweep."""
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    answer = folder / "outcome.json"
    child = os.fork()
    if child == 0:
        signal.alarm(LONGEST)
        try:
            outcome = examine(task, model_type, folder)
        except BaseException as error:  # a failure of the merge that is no refusal
            outcome = Outcome("wrong", " ".join(f"{type(error).__name__}: {error}".split())[:300])
        answer.write_text(json.dumps([outcome.kind, outcome.sentence]))
        os._exit(0)
    os.waitpid(child, 0)
    found = json.loads(answer.read_text()) if answer.is_file() else ["unbuilt", f"no outcome in {LONGEST} s"]
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(*found)


def table(outcomes: dict[tuple[str, str], Outcome]) -> str:
    """As the page of measurements has it."""
    lines = [
        "| task | right | refused | wrong | PEFT fails or no effect | does not build small |",
        "|---|" * 1 + "---|" * 5,
    ]
    for task in TASKS:
        kinds = Counter(outcome.kind for (name, _), outcome in outcomes.items() if name == task)
        judged = kinds["right"] + kinds["refused"] + kinds["wrong"]
        others = kinds["peft"] + kinds["no effect"]
        lines.append(
            f"| {task} | {kinds['right']} of {judged} | {kinds['refused']} | {kinds['wrong']} | {others} "
            f"| {kinds['unbuilt']} |"
        )
    for (task, model_type), outcome in sorted(outcomes.items()):
        if outcome.kind in ("refused", "wrong"):
            lines.append(f"- {task}, {model_type}, {outcome.kind}: {outcome.sentence}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
