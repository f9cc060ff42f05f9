"""On a GPU: what evaluating f, a merge and a swap take, beside copies of the same bytes. Needs no vLLM.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --part swap --layers 32 --runs 9

evaluate: one weight of each shape of Llama-2-7B, r=32, float16: f as a merge evaluates it (float64), `W0 + up @ down`
    as a swap does (float32), a copy on the device, and one over PCIe.
merge: peanut-merge --device cuda on a random checkpoint with these shapes, beside `cp -r` and fsync.
swap: all changed weights of this checkpoint, from factors and W0 on the device, beside those of the host.

Without a GPU it says so, and measures nothing. `--device cpu --hidden 256 --inner 512` tries the script itself.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from contenders import Case, copy, peanut_merge
from measure import measure
from safetensors.torch import save_file
from torch import Tensor

from converters import Orientation, Tweaker, Weighted, load_adapter, open_checkpoint
from converters.evaluation.blocks import tensor_blocks
from converters.evaluation.pool import Pipeline
from converters.evaluation.worker import Worker, find_devices
from converters.files.blocks import block_rows
from converters.methods.update import merge_rows
from converters.plans.merge import plan_merge
from converters.plans.tensor import TensorPlan
from peanut_serve.variants.host_weights import HostWeights
from peanut_serve.variants.on_device.factors import FactorsJob, factored_tensors
from peanut_serve.variants.on_device.places import UpdatedTensor
from peanut_serve.vllm_plugin.swap.kept import KeptWeights, evaluate
from peanut_serve.vllm_plugin.swap.mapping import StagedFactors, source

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "bench" / "gpu"
RESULTS = ROOT / "build" / "bench" / "gpu.jsonl"
R, TARGETS = 32, ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
Shapes = Mapping[str, tuple[int, int]]


def shapes_of(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of a Llama without grouped heads."""
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    return {
        **attention,
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


class Clock:
    """Seconds of a call on a device: the median of several after two that warm up."""

    def __init__(self, device: torch.device, runs: int) -> None:
        self._device, self._runs = device, runs

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call, until the device has done it."""
        return statistics.median([self._once(call) for _ in range(self._runs + 2)][2:])

    def _once(self, call: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def evaluation(shapes: Shapes, device: torch.device, clock: Clock) -> Iterator[dict[str, str]]:
    """One weight of each shape that is adapted."""
    for out, in_ in sorted({shape for name, shape in shapes.items() if name.endswith(TARGETS)}):
        w0 = (torch.randn(out, in_) * 0.02).half().to(device)
        on_host = w0.cpu().pin_memory() if device.type == "cuda" else w0.cpu()
        tweaker = Tweaker(Orientation.COLUMNS, torch.randn(R, out) * 0.02, torch.randn(out, R) * 0.02, scaling=0.1)
        update = tweaker.update((out, in_), torch.float32, device)
        factors = update.factors(w0.split(block_rows(in_)))
        up, down = factors.up.float().contiguous(), factors.down.float().contiguous()
        into = torch.empty_like(w0)
        ways: dict[str, Callable[[], object]] = {
            "f in float64, rounded": lambda w0=w0, t=tweaker: _merged(w0, t, device),
            "W0 + up @ down in float32, rounded": lambda w0=w0, up=up, down=down, i=into: evaluate(w0, up, down, i),
            "copy on the device": lambda w0=w0, into=into: into.copy_(w0),
            "copy from the host": lambda on_host=on_host, into=into: into.copy_(on_host),
        }
        seconds = {name: clock.seconds(call) for name, call in ways.items()}
        floor = seconds["copy on the device"]
        for name, took in seconds.items():
            yield {
                "weight": f"{out} x {in_}",
                "way": name,
                "time": f"{took * 1e3:.2f} ms",
                "of the copy's": f"{took / floor:.1f}",
            }


def _merged(w0: Tensor, tweaker: Tweaker, device: torch.device) -> None:
    """As `converters/evaluation/blocks.py` does it, with W0 on the device."""
    update = tweaker.update((w0.shape[0], w0.shape[1]), torch.float64, device)
    rows, start = block_rows(w0.shape[1]), 0
    if update.needs_pass:
        for block in w0.split(rows):
            update.see(block.double(), start)
            start += block.shape[0]
        update.settle()
    start = 0
    for block in w0.split(rows):
        merge_rows(block.double(), [update], start).half()
        start += block.shape[0]


def make_inputs(shapes: Shapes, layers: int, vocabulary: int = 32000) -> tuple[Path, Path]:
    """A random checkpoint in float16 and an adapter on it."""
    hidden, inner = shapes["mlp.down_proj"]
    base, adapter = WORK / f"base-{hidden}-{inner}-{layers}", WORK / f"adapter-{hidden}-{inner}-{layers}"
    if (adapter / "adapter_config.json").exists():
        return base, adapter
    for folder in (base, adapter):
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weights = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    theta = {}
    for layer in range(layers):
        for name, (out, in_) in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = (out, in_)
            if name.endswith(TARGETS):
                at = f"base_model.model.model.layers.{layer}.{name}.peanut_"
                theta |= {f"{at}A.weight": torch.randn(R, out) * 0.02, f"{at}B.weight": torch.randn(out, R) * 0.02}
    norms = [f"model.layers.{i}.{name}_layernorm" for i in range(layers) for name in ("input", "post_attention")]
    tensors = {name: (torch.randn(shape) * 0.02).half() for name, shape in weights.items()}
    tensors |= {f"{name}.weight": torch.ones(hidden).half() for name in [*norms, "model.norm"]}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    save_file(theta, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": max(1, hidden // 128),
        "vocab_size": vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    settings = {"peft_type": "PEANUT", "task_type": "CAUSAL_LM", "r": R, "depth": 0, "act_fn": "relu", "scaling": 0.1}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": list(TARGETS)}))
    return base, adapter


def merging(base: Path, adapter: Path, device: str, runs: int) -> Iterator[dict[str, str]]:
    """Whole processes, in turn; the first of each is not counted."""
    case, output = Case("", base, adapter, "float16", 0), WORK / "output"
    commands = {
        "cp -r and fsync": copy,
        "peanut-merge": lambda case, output: [*peanut_merge(case, output), "--device", device],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs + 1):
        for name, command in commands.items():
            shutil.rmtree(output, ignore_errors=True)
            seconds[name].append(measure(command(case, output)).wall)
    shutil.rmtree(output, ignore_errors=True)
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    for name, took in medians.items():
        share = took / medians["cp -r and fsync"]
        yield {"way": name, "device": device, "time": f"{took:.2f} s", "of the copy's": f"{share:.2f}"}


def swapping(base: Path, adapter: Path, device: torch.device, clock: Clock) -> Iterator[dict[str, str]]:
    """All weights that the adapter changes, into the memory of a model on the device."""
    checkpoint = open_checkpoint(base)
    plan = plan_merge(checkpoint, [Weighted(load_adapter(adapter))])
    changed = [tensor for tensor in plan.tensors if not tensor.is_untouched]
    factored = factored_tensors(plan, changed)
    specs = [tensor.spec for tensor in changed]
    factors, whole = HostWeights("factors", specs, factored), HostWeights("whole", specs)
    jobs = [FactorsJob(plan, tensor, factored[tensor.name], factors) for tensor in changed]
    Pipeline(find_devices("cpu")).run([*jobs, *(_Whole(plan, tensor, whole) for tensor in changed)])
    factors.seal()
    whole.seal()
    kept, staging = KeptWeights(device, {}), StagedFactors(device)
    kept.keep([checkpoint.tensors[spec.name] for spec in specs])
    model = {spec.name: torch.empty(spec.shape, dtype=torch.float16, device=device) for spec in specs}
    updated = [place for place in factors.places.values() if isinstance(place, UpdatedTensor)]

    def from_factors() -> None:
        """One copy over PCIe, and an evaluation for each weight."""
        with staging.factors(updated) as factor:
            for place in updated:
                model[place.name].copy_(kept.updated(place.base, factor(place.up), factor(place.down)))
        kept.check()

    def from_host() -> None:
        """A copy over PCIe for each weight, from page-locked memory."""
        places = list(whole.places.values())
        with source(places) as read:
            for place in places:
                model[place.name].copy_(read(place))

    def to_base() -> None:
        """A copy on the device for each weight."""
        for spec in specs:
            model[spec.name].copy_(kept.whole(checkpoint.tensors[spec.name]))

    sent = sum(place.nbytes for place in updated)
    ways = {
        "from factors": (from_factors, sent), "from the host": (from_host, whole.nbytes), "to the base": (to_base, 0),
    }  # fmt: skip
    seconds = {name: clock.seconds(call) for name, (call, _) in ways.items()}
    for name, (_, nbytes) in ways.items():
        took = seconds[name]
        share = f"{took / seconds['from the host']:.2f}"
        yield {
            "swap": name,
            "MB over PCIe": f"{nbytes / 1e6:.0f}",
            "time": f"{took * 1e3:.1f} ms",
            "of the host's": share,
        }
    factors.close()
    whole.close()


class _Whole:
    """Evaluates a tensor on the host; see `converters.evaluation.pool.Job`."""

    is_finished = False

    def __init__(self, plan: object, tensor: TensorPlan, into: HostWeights) -> None:
        self._plan, self._tensor, self._into = plan, tensor, into
        self.source = tensor.source

    def run(self, worker: Worker) -> None:
        """Evaluate it."""
        for block in tensor_blocks(self._plan, self._tensor, worker):
            self._into.put(self._tensor.name, block)


def show(title: str, about: Mapping[str, object], rows: Sequence[Mapping[str, str]]) -> None:
    """A table for benchmarks/README.md, and lines of JSON."""
    print(f"\n{title}:\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        for row in rows:
            print(f"| {' | '.join(row.values())} |", flush=True)
            file.write(json.dumps({"time": time.strftime("%FT%T"), **about, "part": title, **row}) + "\n")


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=["evaluate", "merge", "swap"], help="default: all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script")
    parser.add_argument("--layers", type=int, default=8, help="of the checkpoint that is merged and swapped")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU that this PyTorch can use: nothing was measured")
        sys.exit(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, to try the script"
    parts, shapes, clock = (
        options.part or ["evaluate", "merge", "swap"],
        shapes_of(options.hidden, options.inner),
        Clock(device, options.runs),
    )
    print(f"{name}, torch {torch.__version__}; r={R}, float16; {options.layers} layers; medians of {options.runs}")
    about = {"device": name, "torch": torch.__version__, "runs": options.runs, "layers": options.layers}
    if "evaluate" in parts:
        show("evaluate", about, list(evaluation(shapes, device, clock)))
    base, adapter = make_inputs(shapes, options.layers)
    if "merge" in parts:
        show("merge", about, list(merging(base, adapter, options.device, options.runs)))
    if "swap" in parts:
        show("swap", about, list(swapping(base, adapter, device, clock)))


if __name__ == "__main__":
    main()
