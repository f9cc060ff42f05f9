"""peanut-merge beside PEFT's merge, side by side in one run: time and memory of the whole process.

    make bench            (SmolLM2-135M and a random Llama of 1.1B parameters, 5 counted runs each)

The runs alternate, after one that is not counted, with a warm page cache. Ours verifies and syncs its output;
PEFT's does neither.
"""

import shutil
import sys
from pathlib import Path

from measure import Cost, machine, measure, median

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "bench"
SMOLLM2 = ROOT / "build" / "bases" / "smollm2-135m-instruct"
RUNS = 5
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]

PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


def prepare() -> dict[str, tuple[Path, Path]]:
    """Name -> (base, adapter); made if they are not there."""
    import torch
    from peft import PeanutConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    big = WORK / "llama-1.1b"
    torch.manual_seed(0)
    if not (big / "config.json").exists():
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
            num_key_value_heads=4, vocab_size=32000,
        )  # fmt: skip
        LlamaForCausalLM(config).bfloat16().save_pretrained(big)
    cases = {"SmolLM2-135M": (SMOLLM2, WORK / "adapter-135m"), "random Llama 1.1B": (big, WORK / "adapter-1.1b")}
    for base, adapter in cases.values():
        if not (adapter / "adapter_config.json").exists():
            model = AutoModelForCausalLM.from_pretrained(base)
            settings = PeanutConfig(r=32, target_modules=TARGETS, init_weights=False, scaling=0.1)
            get_peft_model(model, settings).save_pretrained(adapter)
    return cases


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
    print(f"{machine()}, {RUNS} runs each, medians\n")
    print("| model | | wall | CPU | peak RSS | peak anonymous |")
    print("|---|---|---|---|---|---|")
    for name, (base, adapter) in prepare().items():
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
