"""Adaptive merging beside LoRA mode and merged mode: tokens a second and latencies on four traces, over HTTP.

    make bench-adaptive                       (SmolLM2-135M in bfloat16 on the CPU; about 80 minutes)
    python benchmarks/adaptive.py --seconds 60 --warm-up 30 --way lora --way adaptive --trace 80/20

Clients ask one request after another, each for a variant that is drawn by the shares of the trace. The first minute
of a trace is not counted, in which the policy learns it, but for the trace whose hot variant is another one each
minute, of which everything counts. "others" are the requests for all variants but the hot one.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import httpx
import torch
from make_inputs import make_adapter
from measure import machine
from rich import box
from rich.console import Console
from rich.table import Table
from serving import BASE
from swapping_load import MODELS, PATIENCE, WORK, Model, Server

RESULTS = WORK.parent / "adaptive.jsonl"
EXAMPLES = MODELS["smollm2-bfloat16"]
RANDOM = tuple(f"random-{number}" for number in range(5))
VARIANTS = (*EXAMPLES.variants, *RANDOM)
PROMPT = 64  # tokens, no two alike
MINUTE = 60.0

Mix = Callable[[float], Mapping[str, float]]  # seconds -> variant -> its share


def shifting(now: float) -> Mapping[str, float]:
    """Each minute, another of three variants has 80 % of the requests."""
    hot = EXAMPLES.variants[int(now // MINUTE) % 3]
    return {name: 0.8 if name == hot else 0.1 for name in EXAMPLES.variants}


TRACES: dict[str, Mix] = {
    "80/20": lambda now: dict(zip(EXAMPLES.variants, (0.8, 0.1, 0.1), strict=True)),
    "50/30/20": lambda now: dict(zip(EXAMPLES.variants, (0.5, 0.3, 0.2), strict=True)),
    "uniform over 8": lambda now: dict.fromkeys(VARIANTS, 1.0),
    "shifting": shifting,
}
ADAPTIVE = ("--resident", "auto")
FIXED = ("--resident", EXAMPLES.variants[0])
# the mode, and its options
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lora": ("lora", ()),
    "merged": ("merged", tuple(part for name in VARIANTS for part in ("--preload", name))),
    "adaptive": ("auto", ADAPTIVE),
    "adaptive, gather 8 s": ("auto", (*ADAPTIVE, "--gather", "8000")),
    "resident fixed": ("auto", FIXED),
    "resident fixed, gather 8 s": ("auto", (*FIXED, "--gather", "8000")),
}


@dataclass
class Found:
    """What came of a trace.

    Attributes:
        seconds: that were counted.
        tokens: of answers that ended in them.
        latencies: variant is the hot one of its time -> seconds of each request.
        paths: how answers were computed.
    """

    seconds: float = 0.0
    tokens: int = 0
    latencies: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    paths: Counter[str] = field(default_factory=Counter)

    @property
    def all(self) -> list[float]:
        """The latencies of all."""
        return [*self.latencies[True], *self.latencies[False]]


def inputs() -> Model:
    """The adapters of the examples, and random ones of about their rank."""
    folder = WORK / "adapters-adaptive"
    folder.mkdir(parents=True, exist_ok=True)
    for name in EXAMPLES.variants:
        if not (folder / name).exists():
            (folder / name).symlink_to((EXAMPLES.adapters / name).resolve())
    for number, name in enumerate(RANDOM):
        torch.manual_seed(number)
        make_adapter(BASE, folder / name, 16)
    return replace(EXAMPLES, name="adaptive", adapters=folder, variants=VARIANTS)


async def run(server: Server, mix: Mix, options: argparse.Namespace, warm_up: float) -> Found:
    """Ask for so long, with so many clients."""
    found, dice = Found(), random.Random(0)
    start = time.perf_counter()

    async def client(http: httpx.AsyncClient) -> None:
        """Ask one after the other."""
        while (now := time.perf_counter() - start) < warm_up + options.seconds:
            shares = mix(now)
            (name,) = dice.choices(list(shares), list(shares.values()))
            prompt = [dice.randrange(1000, 31000) for _ in range(PROMPT)]
            new = dice.randint(options.tokens // 2, options.tokens * 3 // 2)
            body = {"model": name, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
            began = time.perf_counter()
            answer = await http.post("/v1/completions", json=body)
            answer.raise_for_status()
            if began - start >= warm_up:
                found.tokens += new
                found.latencies[name == max(shares, key=lambda one: shares[one])].append(time.perf_counter() - began)
                found.paths[answer.headers["x-peanut-path"]] += 1

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(options.clients)))
        found.seconds = time.perf_counter() - start - warm_up
    return found


def changes(server: Server) -> float:
    """Swaps so far, those to another resident among them."""
    return server.counters().get("peanut_swaps_total", 0.0)


def report(way: str, trace: str, found: Found, swaps: float, table: Table) -> None:
    """A row of the table, and the figures behind it."""
    others = found.latencies[False]
    paths = ", ".join(f"{path} {count / len(found.all):.0%}" for path, count in sorted(found.paths.items()))
    row = {
        "trace": trace, "served by": way, "tokens/s": f"{found.tokens / found.seconds:.0f}",
        "p50": f"{statistics.median(found.all):.1f} s", "p95": f"{_p95(found.all):.1f} s",
        "others p50": f"{statistics.median(others):.1f} s", "others p95": f"{_p95(others):.1f} s",
        "swaps": f"{swaps:.0f}", "paths": paths,
    }  # fmt: skip
    if not table.columns:
        for name in row:
            table.add_column(name)
    table.add_row(*row.values())
    line = {"time": time.strftime("%FT%T"), "machine": machine(), "torch": torch.__version__, **row}
    with RESULTS.open("a") as file:
        file.write(json.dumps({**line, "latencies": found.latencies, "counted_seconds": found.seconds}) + "\n")
    print(" ".join(f"{name}={value}" for name, value in row.items()), file=sys.stderr, flush=True)


def _p95(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1]


def main() -> None:
    """Measure what is asked for, and print the table that stands in benchmarks/README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", action="append", choices=list(WAYS), help="only this; again for more")
    parser.add_argument("--trace", action="append", choices=list(TRACES), help="only this; again for more")
    parser.add_argument("--clients", type=int, default=16, help="at once")
    parser.add_argument("--seats", type=int, default=8, help="--max-num-seqs of vLLM")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, on average")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each trace that are counted")
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds before them")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped
    WORK.mkdir(parents=True, exist_ok=True)
    model, table = inputs(), Table(box=box.MARKDOWN)
    print(f"{machine()}, torch {torch.__version__}; {options.clients} clients, {options.seconds:.0f} s a trace")
    engine = ("--enforce-eager", "--no-enable-prefix-caching", "--max-num-seqs", str(options.seats))
    try:
        for way in options.way or WAYS:
            mode, own = WAYS[way]
            with model.served("adaptive", *engine, *own, mode=mode) as server:
                for name in VARIANTS:  # evaluated before anything is measured
                    asyncio.run(run(server, lambda now, name=name: {name: 1.0}, _once(options), 0.0))  # type: ignore[misc]
                for trace in options.trace or TRACES:
                    before = changes(server)
                    warm_up = 0.0 if trace == "shifting" else options.warm_up
                    found = asyncio.run(run(server, TRACES[trace], options, warm_up))
                    report(way, trace, found, changes(server) - before, table)
    finally:
        Console(width=200).print(table)


def _once(options: argparse.Namespace) -> argparse.Namespace:
    """One short request of each client."""
    return argparse.Namespace(**{**vars(options), "seconds": 0.001, "tokens": 4, "clients": 1})


if __name__ == "__main__":
    main()
