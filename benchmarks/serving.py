"""LoRA adapters beside base and merged checkpoint in vLLM: prefill and decode; and what evaluating an adapter takes.

    make bench-serving                          (about 25 minutes; with 7B: 15 GB of disk)
    python benchmarks/serving.py --no-7b

Every engine is a process of its own, on SmolLM2 in float32: 8 requests at once, of 128 tokens each (prefill: for one
token more; decode: 32 tokens, less the prefill). Medians of the runs after a first one.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from contenders import PYTHON
from measure import machine

from converters import merge, prepare_merge
from converters.outputs.lora import plan_lora_adapter, write_lora_adapter

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "bench"
BASE = ROOT / "build" / "bases" / "smollm2-135m-instruct"
ADAPTERS = ROOT / "examples" / "adapters"
REQUESTS, PROMPT, NEW = 8, 128, 32

ENGINE = """
import json, statistics, sys, time
if __name__ == "__main__":
    model, adapters, names, eager, stock, requests, prompt, new, runs = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams
    from peanut_serve import LoraRequests
    lora = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 32} if names else {}
    kinds = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    lora |= {"lora_target_modules": kinds} if names else {}
    llm = LLM(model, dtype="float32", max_model_len=1024, enforce_eager=eager, enable_prefix_caching=False, **lora)
    tasks = LoraRequests(model, adapters) if names else None
    used = [tasks.get(name) if name else None for name in names]
    picked = [used[i % len(used)] for i in range(requests)] if names else None
    prompts = [{"prompt_token_ids": [1000 + (7 * i + j) % 30000 for j in range(prompt)]} for i in range(requests)]
    def seconds(count):
        start = time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        llm.generate(prompts, params, lora_request=picked, use_tqdm=False)
        return time.perf_counter() - start
    seconds(2)
    prefill = [seconds(1) for _ in range(runs)]
    whole = [seconds(new + 1) for _ in range(runs)]
    one = statistics.median(prefill)
    rest = statistics.median(whole) - one
    print("RATES", json.dumps([requests * prompt / one, requests * new / rest]))
"""


def rates(model: Path, names: list[str | None], eager: bool, stock: bool, runs: int) -> tuple[float, float]:
    """Tokens a second of prefill and of decode; `names` of adapters, None for the base."""
    facts = [str(model), str(ADAPTERS), names, eager, stock, REQUESTS, PROMPT, NEW, runs]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "PEANUT_CACHE": str(WORK / "evaluated")}
    if stock:
        environment["VLLM_PLUGINS"] = "none"
    script = WORK / "engine.py"
    script.write_text(ENGINE)
    done = subprocess.run([PYTHON, script, json.dumps(facts)], capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RATES ")]
    if not lines:
        raise RuntimeError(done.stderr[-3000:])
    prefill, decode = json.loads(lines[0].removeprefix("RATES "))
    return prefill, decode


def serve(runs: int) -> None:
    """The table of rates."""
    merged = merge(BASE, ADAPTERS / "smollm2-math", WORK / "served", overwrite=True).output
    three: list[str | None] = ["smollm2-json", "smollm2-math", "smollm2-upper", None]
    cases = {
        "base": (BASE, [], False, False),
        "base, eager": (BASE, [], True, False),
        "merged, eager": (merged, [], True, False),
        "LoRA on, base requests": (BASE, [None], True, False),
        "one adapter": (BASE, ["smollm2-math"], True, False),
        "three adapters and the base": (BASE, three, True, False),
        "one adapter, vLLM's operators": (BASE, ["smollm2-math"], True, True),
        "three adapters and the base, vLLM's operators (wrong)": (BASE, three, True, True),
    }
    print("| | prefill, tokens/s | of eager base's | decode, tokens/s | of eager base's |\n|---|---|---|---|---|")
    eager = rates(*cases["base, eager"], runs)
    for name, case in cases.items():
        prefill, decode = eager if name == "base, eager" else rates(*case, runs)
        of_prefill, of_decode = prefill / eager[0], decode / eager[1]
        print(f"| {name} | {prefill:.0f} | {of_prefill:.2f} | {decode:.0f} | {of_decode:.2f} |", flush=True)
    shutil.rmtree(merged)


def convert(large: bool, runs: int) -> None:
    """The table of conversions."""
    make = [sys.executable, Path(__file__).with_name("make_inputs.py"), WORK, *(["--7b"] if large else [])]
    subprocess.run(make, check=True)
    cases = {
        "SmolLM2-135M, r=32": (BASE, WORK / "adapter-135m"),
        "random 1.1B, r=32": (WORK / "llama-1.1b", WORK / "adapter-1.1b"),
        **({"random 7B, r=32": (WORK / "llama-7b", WORK / "adapter-7b-r32")} if large else {}),
    }
    print("\n| | evaluating | reading | LoRA | largest error of the largest delta |\n|---|---|---|---|---|")
    for name, (base, adapter) in cases.items():
        seconds, output = [], WORK / "lora"
        for _ in range(runs):
            shutil.rmtree(output, ignore_errors=True)
            start = time.perf_counter()
            converted = plan_lora_adapter(prepare_merge(base, adapter), output)
            check = write_lora_adapter(converted, device="cpu")
            seconds.append(time.perf_counter() - start)
        sizes = f"{converted.source_bytes / 1e9:.2f} GB | {converted.nbytes / 1e6:.0f} MB"
        print(f"| {name} | {statistics.median(seconds):.1f} s | {sizes} | {check.max_error:.1e} |", flush=True)
    for path in WORK.glob("*-7b*"):
        shutil.rmtree(path)


def main() -> None:
    """Measure, and print the tables that stand in benchmarks/README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=["engines", "conversion"], help="one of the two tables")
    parser.add_argument("--no-7b", action="store_true", help="leave out the conversion of 7B")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}, torch {torch.__version__}; medians of {options.runs}\n")
    if options.only != "conversion":
        serve(options.runs)
    if options.only != "engines":
        convert(not options.no_7b, options.runs)


if __name__ == "__main__":
    main()
