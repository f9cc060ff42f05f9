"""Swapping merged variants in a running vLLM beside other ways to other weights; and what serving them costs.

    make bench-swapping
    python benchmarks/swapping.py --part swap --model smollm2-bfloat16 --runs 5

swap: variants swapped through the admin API, by phase, and a plain copy of the bytes.
peers: vLLM's own reload_weights from a merged folder, in turn with the swaps, and starts of vLLM on it.
ways: swaps from the host or from factors and W0 on the device, with layers packed anew or exchanged.
throughput: a variant beside plain vLLM on the base.
traffic: requests for three variants at once.
profile: what applying a variant spends its time on; not in a default run, nor throughput and traffic of every model.
"""

import argparse
import json
import shutil
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from measure import machine
from rich import box
from rich.console import Console
from rich.table import Table
from serving import BASE, NEW
from swapping_load import MODELS, WORK, Model, Server, ask_all, burst, copying, make_inputs, mixture, profiled, rates

PARTS = ("swap", "peers", "ways", "throughput", "traffic")
RESULTS = WORK.parent / "swapping.jsonl"
PHASES = ("quiesce", "apply", "invalidate", "check")
TO_OTHER, TO_BASE, FROM_BASE, FIRST = "variant to variant", "variant to base", "base to variant", "first, evaluated"
COPIES = {"copy of the bytes, 1 thread": 1, "copy of the bytes, 2 threads": 2}
TRAFFIC = "smollm2-bfloat16"  # unless other models are asked for
# vLLM 0.32 compiles at every start on a CPU: what it has compiled before, it fails to load
EAGER = "--enforce-eager"
RELOAD, START, START_EAGER = "vLLM's reload_weights", "start of vLLM", f"start of vLLM, {EAGER}"
ANEW, EXCHANGED, DEVICE = ("--packed-cache", "0"), ("--packed-cache", "8GiB"), ("--base-copy", "device")
WAYS = (ANEW, EXCHANGED, (*DEVICE, *ANEW), (*DEVICE, *EXCHANGED))
COUNTERS = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", "peanut_swaps_total")


class Results:
    """What was measured: lines of JSON in a file, and rows of tables."""

    def __init__(self, runs: int) -> None:
        self._about = {"machine": machine(), "torch": torch.__version__, "runs": runs}
        self._tables: dict[str, Table] = {}

    def add(self, part: str, row: dict[str, str], **figures: Any) -> None:
        """A row as it is shown, and the figures behind it."""
        if part not in self._tables:
            self._tables[part] = Table(box=box.MARKDOWN)
            for name in row:
                self._tables[part].add_column(name)
        self._tables[part].add_row(*row.values())
        line = {"time": time.strftime("%FT%T"), **self._about, "part": part, **row, **figures}
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(" ".join(f"{name}={value}" for name, value in row.items()), file=sys.stderr, flush=True)

    def show(self) -> None:
        """All tables, for benchmarks/README.md."""
        for part, table in self._tables.items():
            print(f"\n{part}:")
            Console(width=160).print(table)


@dataclass
class Seconds:
    """Of everything that is compared, by name; of swaps by phase as well, and their bytes."""

    whole: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    phases: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))
    nbytes: dict[str, int] = field(default_factory=dict)

    def swap(self, server: Server, kind: str, name: str) -> None:
        """Swap a variant in."""
        whole, phases = server.activate(name)
        self.whole[kind].append(whole)
        self.phases[kind].append(phases)
        self.nbytes[kind] = server.last_swap()[1]

    def median(self, name: str) -> float:
        """In all runs."""
        return statistics.median(self.whole[name])

    def phase(self, kind: str, name: str) -> float:
        """The median of a phase."""
        return statistics.median(phases.get(name, 0.0) for phases in self.phases[kind])


def compare(model: Model, parts: Sequence[str], runs: int, starts: int, results: Results) -> None:
    """Swaps and, in turn with them, reloads; then copies of as many bytes, and starts of vLLM."""
    one, other = model.variants[:2]
    seconds, folders = Seconds(), []
    with ExitStack() as stack:
        turns: list[Callable[[], None]] = []
        if "swap" in parts:
            ours = stack.enter_context(model.served("swap", EAGER))
            for name in (other, one):
                seconds.swap(ours, FIRST, name)
            kinds = {TO_OTHER: other, TO_BASE: model.base.name, FROM_BASE: one}
            turns += [partial(seconds.swap, ours, kind, name) for kind, name in kinds.items()]
        if "peers" in parts:
            folders = [model.merged(one), model.merged(other)]
            plain = stack.enter_context(model.plain(folders[0], "reload", EAGER))
            plain.reload(folders[0])
            turns += [lambda: seconds.whole[RELOAD].extend(plain.reload(folder) for folder in reversed(folders))]
        for _ in range(runs):
            for turn in turns:
                turn()
    if "swap" in parts:
        for name, threads in COPIES.items():
            seconds.whole[name] = copying(seconds.nbytes[TO_OTHER], threads, runs)
        _report_swaps(model, seconds, results)
    for name, options in ((START, ()), (START_EAGER, (EAGER,))) if folders else ():
        for _ in range(starts):
            with model.plain(folders[0], "start", *options) as server:
                seconds.whole[name].append(server.start_seconds)
    _report_peers(model, seconds, results)
    for folder in folders:
        shutil.rmtree(folder)


def _report_swaps(model: Model, seconds: Seconds, results: Results) -> None:
    for kind in (FIRST, TO_OTHER, TO_BASE, FROM_BASE):
        row = {"model": model.name, "swap": kind, "MB": f"{seconds.nbytes[kind] / 1e6:.0f}"}
        row |= {"client": _ms(seconds.median(kind))} | {name: _ms(seconds.phase(kind, name)) for name in PHASES}
        results.add("swap", row, seconds=seconds.whole[kind], phases=seconds.phases[kind])


def _report_peers(model: Model, seconds: Seconds, results: Results) -> None:
    swap = seconds.median(TO_OTHER) if TO_OTHER in seconds.whole else None
    for name in (TO_OTHER, *COPIES, RELOAD, START, START_EAGER):
        if name in seconds.whole:
            took = seconds.median(name)
            row = {"model": model.name, "way": name, "time": _ms(took), "of the swap's": _ratio(took, swap)}
            row |= {"the swap's of it": _ratio(swap, took)}
            results.add("peers", row, seconds=seconds.whole[name])


def ways(model: Model, runs: int, results: Results) -> None:
    """Swaps in servers with other options, one after the other; each way begins with the weights on the host."""
    one, other = model.variants[:2]
    for options in WAYS:
        seconds = Seconds()
        with model.served("ways", EAGER, *options, "--preload", one, "--preload", other) as server:
            for name in (other, one, model.base.name, other):
                server.activate(name)
            for _ in range(runs):
                for kind, name in {TO_OTHER: one, TO_BASE: model.base.name, FROM_BASE: other}.items():
                    seconds.swap(server, kind, name)
        for kind in (TO_OTHER, TO_BASE, FROM_BASE):
            row = {"model": model.name, "options": " ".join(options), "swap": kind}
            row |= {"MB": f"{seconds.nbytes[kind] / 1e6:.1f}", "client": _ms(seconds.median(kind))}
            row |= {name: _ms(seconds.phase(kind, name)) for name in PHASES}
            results.add("ways", row, seconds=seconds.whole[kind], phases=seconds.phases[kind])


def throughput(model: Model, runs: int, results: Results) -> None:
    """Tokens a second of plain vLLM on the base, and of peanut-serve on the base and on a variant, in turn."""
    without = "--no-enable-prefix-caching"
    with model.plain(model.base, "plain", without) as plain, model.served("throughput", without) as ours:
        contenders = {
            "vLLM, base": (plain, "base"),
            "peanut-serve, base": (ours, model.base.name),
            "peanut-serve, variant": (ours, model.variants[0]),
        }
        seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for _ in range(runs + 1):
            for name, (server, variant) in contenders.items():
                if server is ours:
                    server.activate(variant)
                seconds[name].append((burst(server, variant, 1), burst(server, variant, NEW + 1)))
    base = rates(seconds["vLLM, base"][1:])
    for name, found in seconds.items():
        prefill, decode = rates(found[1:])
        row = {"model": model.name, "server": name, "prefill, tokens/s": f"{prefill:.0f}"}
        row |= {"prefill of vLLM's": _ratio(prefill, base[0]), "decode, tokens/s": f"{decode:.0f}"}
        results.add("throughput", row | {"decode of vLLM's": _ratio(decode, base[1])}, seconds=found[1:])


def traffic(model: Model, requests: int, clients: int, prefix: int, results: Results) -> None:
    """Requests for variants at once: what of their prompts was cached, and how long they took."""
    asked = mixture(model.variants, requests, prefix)
    names = [part for name in model.variants for part in ("--preload", name)]
    for cache, wait in (("reset", "10"), ("salted", "10"), ("reset", "0"), ("salted", "0")):
        with model.served("traffic", EAGER, "--prefix-cache", cache, "--max-wait", wait, *names) as server:
            burst(server, model.base.name, 1)
            before = server.counters()
            whole, latencies = ask_all(server, asked, clients)
            after = server.counters()
        counts = {name: after[name] - before.get(name, 0.0) for name in COUNTERS}
        hits, queries, swaps = counts.values()
        row = {"model": model.name, "--prefix-cache": cache, "--max-wait": wait, "swaps": f"{swaps:.0f}"}
        row |= {"cached": f"{hits / queries:.0%}", "mean latency": _ms(statistics.mean(latencies))}
        row |= {"slowest of 20": _ms(statistics.quantiles(latencies, n=20)[-1]), "all": _ms(whole)}
        results.add("traffic", row, latencies=latencies, **counts)


def profile(model: Model, runs: int, results: Results) -> None:
    """Where a worker's time goes while it applies a variant."""
    found = profiled(model, runs)
    whole, turns = sum(found["timed"]), len(found["timed"])
    for stage, (seconds, faults, calls) in sorted(found["stages"].items(), key=lambda item: -item[1][0]):
        row = {"model": model.name, "stage": stage, "time": _ms(seconds / turns), "share": f"{seconds / whole:.0%}"}
        row |= {"calls": f"{calls / turns:.0f}", "page faults": f"{faults / turns:.0f}"}
        results.add("profile", row)
    row = {"model": model.name, "stage": "all", "time": _ms(whole / turns), "share": "100%"}
    row |= {"calls": "", "page faults": ""}
    results.add("profile", row, **found)
    plain = {
        **row,
        "stage": "all, without the stopwatch",
        "time": _ms(statistics.median(found["plain"])),
        "share": "",
    }
    results.add("profile", plain)
    results.add("profile", {**plain, "stage": "the call of the worker", "time": _ms(found["rpc"])})
    for way, seconds in found["ways"].items():
        sent = 0 if "base" in way else found["factors"] if "device" in way else found["nbytes"]
        row = {"model": model.name, "way": way, "MB": f"{sent / 1e6:.1f}", "apply": _ms(statistics.median(seconds))}
        results.add("profile, ways", row, seconds=seconds)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.3g}" if one and other else "-"


def main() -> None:
    """Measure what is asked for, and print the tables that stand in benchmarks/README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=[*PARTS, "profile"], help="only this; again for more")
    parser.add_argument("--profile", action="append_const", dest="part", const="profile", help="--part profile")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this; again for more")
    parser.add_argument("--runs", type=int, default=15, help="of swaps and reloads; of all else, a third")
    parser.add_argument("--starts", type=int, default=2, help="of vLLM, compiled and eager")
    parser.add_argument("--requests", type=int, default=72, help="of the traffic")
    parser.add_argument("--clients", type=int, default=12, help="of the traffic, at once")
    parser.add_argument("--prefix", type=int, default=512, help="tokens that a variant's requests share")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped
    WORK.mkdir(parents=True, exist_ok=True)
    results, parts, few = Results(options.runs), options.part or PARTS, max(1, options.runs // 3)
    print(f"{machine()}, torch {torch.__version__}; medians of {options.runs} swaps")
    try:
        for model in [MODELS[name] for name in options.model or MODELS]:
            make_inputs(model)
            if {"swap", "peers"} & set(parts):
                compare(model, parts, options.runs, options.starts, results)
            if "ways" in parts:
                ways(model, options.runs, results)
            if "throughput" in parts and (options.model or model.base == BASE):
                throughput(model, few, results)
            if "traffic" in parts and (options.model or model.name == TRAFFIC):
                traffic(model, options.requests, options.clients, options.prefix, results)
            if "profile" in parts:
                profile(model, few, results)
    finally:
        results.show()


if __name__ == "__main__":
    main()
