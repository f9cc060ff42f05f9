"""peanut-merge beside PEFT's merge_and_unload, on an adapter of every method, of a random Llama of 1.1B parameters.

    python benchmarks/methods.py                         (one run each: about an hour)
    python benchmarks/methods.py --method loha --runs 3

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
from make_inputs import TARGETS
from measure import Cost, machine, measure, median

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "bench"
BASE = WORK / "llama-1.1b"

# name -> class of the config, and settings that a user would choose
METHODS: dict[str, tuple[str, str]] = {
    "lora": ("LoraConfig", "r=16"),
    "dora": ("LoraConfig", "r=16, use_dora=True"),
    "ia3": ("IA3Config", "feedforward_modules=['down_proj']"),
    "adalora": ("AdaLoraConfig", "init_r=16, total_step=9"),
    "vera": ("VeraConfig", "r=256"),
    "pvera": ("PveraConfig", "r=256"),
    "vblora": ("VBLoRAConfig", "r=4, num_vectors=90, vector_length=256"),
    "unilora": ("UniLoraConfig", "r=4, theta_d_length=4096, save_indices=True"),
    "miss": ("MissConfig", "r=64"),
    "miss-bat": ("MissConfig", "r=64, init_weights='bat'"),
    "gralora": ("GraloraConfig", "r=32, gralora_k=2"),
    "delora": ("DeloraConfig", "r=16"),
    "loha": ("LoHaConfig", "r=16"),
    "lokr": ("LoKrConfig", "r=16"),
    "hira": ("HiraConfig", "r=32"),
    "hra": ("HRAConfig", "r=8"),
    "oft": ("OFTConfig", "oft_block_size=32"),
    "boft": ("BOFTConfig", "boft_block_size=4"),
    "road": ("RoadConfig", "variant='road_1', group_size=64"),
    "fourierft": ("FourierFTConfig", "n_frequency=1000"),
    "c3a": ("C3AConfig", "block_size=256"),
    "shira": ("ShiraConfig", "r=16, random_seed=1"),
    "randlora": ("RandLoraConfig", "r=32"),
    "glora": ("GloraConfig", "r=16"),
    "waveft": ("WaveFTConfig", "n_frequency=2592"),
    "supertuning": ("SupertuningConfig", "sparsity=0.99"),
    "deft": ("DeftConfig", "r=16"),
    "tinylora": ("TinyLoraConfig", "r=2, u=8"),
    "pissa": ("LoraConfig", "r=16, init_lora_weights='pissa'"),
    "kasa": ("LoraConfig", "r=16, kasa_config=peft.tuners.lora.config.KasaConfig()"),
    "bd-lora": (
        "LoraConfig",
        "r=16, use_bdlora=peft.tuners.lora.config.BdLoraConfig("
        "target_modules_bd_a=['o_proj', 'down_proj'], nblocks=4, match_strict=False)",
    ),
}

TRAIN = """
import sys
import peft, torch
from transformers import AutoModelForCausalLM
base, adapter, config, settings, targets = sys.argv[1:]
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
made = eval(f"peft.{config}({settings}, target_modules={targets}, task_type='CAUSAL_LM')")
adapted = peft.get_peft_model(model, made)
with torch.no_grad():
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.02)
adapted.save_pretrained(adapter)
"""


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
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    subprocess.run([sys.executable, Path(__file__).with_name("make_inputs.py"), WORK, "--only-1b"], check=True)
    start = measure(interpreter())
    print(f"{machine()}; {options.runs} runs each; `import torch` alone takes {start.wall:.1f} s\n")
    print("| method | peanut-merge | PEFT | of PEFT's time | peak RSS | PEFT's | of PEFT's |")
    print("|---|---|---|---|---|---|---|")
    case = Case("random 1.1B", BASE, WORK / "adapter-method", "bfloat16", 22)
    for name in options.method or METHODS:
        shutil.rmtree(case.adapter, ignore_errors=True)
        config, settings = METHODS[name]
        subprocess.run([sys.executable, "-c", TRAIN, BASE, case.adapter, config, settings, str(TARGETS)], check=True)
        ours, theirs = compare(replace(case, name=name), options.runs).values()
        time, memory = ours.wall / theirs.wall, ours.peak_rss / theirs.peak_rss
        row = (f"{ours.wall:.1f} s", f"{theirs.wall:.1f} s", f"{time:.2f}", f"{ours.peak_rss:.0f} MB",
               f"{theirs.peak_rss:.0f} MB", f"{memory:.2f}")  # fmt: skip
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    shutil.rmtree(case.adapter, ignore_errors=True)


if __name__ == "__main__":
    main()
