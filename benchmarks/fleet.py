"""A fleet of real engines: our routing beside Ray Serve's own, and what the front adds to a request.

    make bench-fleet
    python benchmarks/fleet.py --seconds 30 --requests 30

routing: one engine, then two with either router, get the same requests for eight variants of SmolLM2 in merged mode.
They come at random moments, and for variants by Zipf's law. How many come is chosen by what a swap takes here.
front: the same engine asked directly and through the front, in turn.
"""

import argparse
import json
import signal
import statistics
import sys
import time
from typing import Any

import httpx
import ray
from fleet_load import NEW, PROMPT, VARIANTS, WORK, Engine, fleet, latencies, one_request, one_stream, zipf
from measure import machine
from rich import box
from rich.console import Console
from rich.table import Table

from peanut_serve.ray.app import ROUTING

RESULTS = WORK.parent / "fleet.jsonl"
OURS, RAYS = "by cost", "Ray's power of two"
ROUTERS = {OURS: ROUTING, RAYS: {**ROUTING, "request_router_class": "fleet_routers:PowerOfTwo"}}
TOKENS = 32  # of a stream


def routing(replicas: int, router: str, options: argparse.Namespace) -> dict[str, Any]:
    """The latencies and swaps of all requests with one router; of one engine, also what the front adds."""
    with fleet(replicas, ROUTERS[router]) as (url, engines):
        swap = statistics.median(engine.swap_seconds() for engine in engines)
        options.rate = options.rate or options.load / swap
        found: dict[str, Any] = {"replicas": replicas, "router": router, "swap_seconds": swap, "rate": options.rate}
        requests = zipf(options.rate * replicas, options.seconds, options.exponent, options.seed)
        before = sum(engine.swaps() for engine in engines)
        found["latencies"] = latencies(url, requests)
        found["swaps"] = sum(engine.swaps() for engine in engines) - before
        if replicas == 1:
            found["front"] = front(url, engines[0], options.requests)
    _keep(found)
    return found


def front(url: str, engine: Engine, requests: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of small requests, of first tokens and of each token, directly and through the front, in turn."""
    found = {way: {"request": [], "first token": [], "each token": []} for way in ("direct", "front")}
    with engine.client as direct, httpx.Client(base_url=url, timeout=900, trust_env=False) as through:
        ways = {"direct": direct, "front": through}
        for number in range(requests + 5):
            for way, client in ways.items():
                seconds, stream = one_request(client), one_stream(client, TOKENS) if number % 5 == 0 else None
                if number < 5:
                    continue  # connections are made
                found[way]["request"].append(seconds)
                if stream:
                    found[way]["first token"].append(stream.first)
                    found[way]["each token"].append(stream.token)
    return found


def show(runs: list[dict[str, Any]]) -> None:
    """Print the tables that stand in benchmarks/README.md."""
    table = Table(box=box.MARKDOWN)
    for name in ("engines", "router", "requests/s", "swaps a request", "p50", "p95", "p95 of Ray's"):
        table.add_column(name)
    rays = next((_percentile(run, 95) for run in runs if run["router"] == RAYS), None)
    for run in runs:
        p95, count = _percentile(run, 95), len(run["latencies"])
        of_rays = f"{p95 / rays:.2f}" if rays and run["replicas"] > 1 else "-"
        name = run["router"] if run["replicas"] > 1 else "-"
        row = (f"{run['replicas']}", name, f"{run['rate'] * run['replicas']:.1f}", f"{run['swaps'] / count:.2f}")
        table.add_row(*row, f"{_percentile(run, 50):.2f} s", f"{p95:.2f} s", of_rays)
    Console(width=160).print(table)
    added = Table(box=box.MARKDOWN)
    for name in ("", "direct, median", "through the front", "added"):
        added.add_column(name)
    for kind in ("request", "first token", "each token"):
        medians = [statistics.median(run["front"][way][kind]) for run in runs[:1] for way in ("direct", "front")]
        added.add_row(kind, *(f"{seconds * 1e3:.1f} ms" for seconds in (*medians, medians[1] - medians[0])))
    Console(width=160).print(added)


def _percentile(run: dict[str, Any], percent: int) -> float:
    return statistics.quantiles(run["latencies"], n=100)[percent - 1]


def _keep(found: dict[str, Any]) -> None:
    line = {"time": time.strftime("%FT%T"), "machine": machine(), "ray": ray.__version__, **found}
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{found['replicas']} {found['router']}: {len(found['latencies'])} requests", file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0, help="in which requests come, for each row")
    parser.add_argument("--load", type=float, default=1.0, help="requests that come to an engine while it swaps")
    parser.add_argument("--rate", type=float, help="requests a second and engine, instead of --load")
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    parser.add_argument("--requests", type=int, default=100, help="with which the front is measured")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the fleets are stopped
    WORK.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}, Ray {ray.__version__}; {len(VARIANTS)} variants, {PROMPT} + {NEW} tokens")
    runs: list[dict[str, Any]] = []
    try:
        for replicas, router in ((1, OURS), (2, RAYS), (2, OURS)):
            runs.append(routing(replicas, router, options))
    finally:
        if runs:
            show(runs)


if __name__ == "__main__":
    main()
