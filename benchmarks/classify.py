"""`peanut-serve classify` beside FastAPI with a pipeline of transformers, and beside a bare ONNX Runtime session.

    make bench-classify
    python benchmarks/classify.py --short --seconds 3              (a check of this script, on smaller models)

rate: answers per second and p95 at 1, 8 and 32 clients, for a ViT-B/16 and a MiniLM; the bare session is called in a
      loop on the same inputs, with the same preprocessing, one after the other.
memory: what a server has in memory for itself (USS), and how much of it is anonymous, when it has answered for 1, 10
      and 100 tasks of one swappable graph. The rest is pages of files, which the system can drop: graphs are mapped.

Every row is added to build/bench/classify.jsonl; remove the file to begin anew.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it

import httpx
from classify_inputs import REAL, ROOT, SHORT, WORK, Served, make
from classify_load import Load, ask, percentile
from rich import box
from rich.console import Console
from rich.table import Table

from converters.inference.preprocessing import open_preprocessor
from peanut_serve.classify.engine import OnnxEngine
from peanut_serve.classify.predictions import predictions

RESULTS = WORK.parent / "classify.jsonl"
CLIENTS = (1, 8, 32)
COUNTS = (1, 10, 100)
PARTS = ("rate", "memory")
_START = 300.0  # seconds for a server to answer


def bare(case: Served, seconds: float, threads: int) -> Load:
    """A session in a loop: read the input, preprocess it, run the graph, make labels of the logits."""
    task = OnnxEngine(case.onnx, threads=threads).load()
    preprocess = open_preprocessor(case.onnx, task.task.kind, task.task.config)
    bodies = case.bodies()
    given = [body if case.kind == "image" else json.loads(body)["inputs"] for body in bodies]
    found: list[float] = []
    for turn in range(3):
        task.run_all(preprocess([given[turn % len(given)]]))
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        began = time.perf_counter()
        (row,) = task.run_all(preprocess([given[len(found) % len(given)]]))[0]
        predictions(row, task.task.labels, 5)
        found.append(time.perf_counter() - began)
    return Load(len(found) / (time.perf_counter() - start), percentile(found, 0.5), percentile(found, 0.95))


@contextmanager
def process(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server, from its first answer on; without its output."""
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + _START
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/ready", timeout=_START)
                break
            except httpx.TransportError:
                if time.monotonic() > until or running.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} does not answer") from None
                time.sleep(0.2)
        yield running
    finally:
        running.terminate()
        running.wait(60)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def ours(folder: Path, port: int, threads: int, *more: str) -> list[str]:
    """The command of this toolkit."""
    start = "from peanut_serve.cli import main; main()"
    own = ["--port", str(port), "--threads", str(threads), "--max-queue", "1024", *more]
    return [sys.executable, "-c", start, "classify", str(folder), *own]


def peer(case: Served, port: int, threads: int) -> list[str]:
    """FastAPI with a pipeline."""
    task = f"{case.kind}-classification"
    return [sys.executable, "benchmarks/classify_peer.py", task, str(case.merged), str(port), str(threads)]


def rates(case: Served, seconds: float, threads: int) -> Iterator[dict[str, Any]]:
    """Every contender in turn."""
    alone = bare(case, seconds, threads)
    yield _row(case, "ONNX Runtime in a loop", 1, alone, alone)
    own, other = free_port(), free_port()
    servers = (
        ("peanut-serve classify", ours(case.onnx, own, threads), own, "/models/task"),
        ("FastAPI, pipeline", peer(case, other, threads), other, "/predict"),
    )
    for name, command, port, path in servers:
        with process(command, port):
            url = f"http://127.0.0.1:{port}{path}"
            ask(url, case.bodies(), case.content_type, 2, min(seconds, 3.0))  # warms up
            for clients in CLIENTS:
                yield _row(case, name, clients, ask(url, case.bodies(), case.content_type, clients, seconds), alone)


def _row(case: Served, name: str, clients: int, load: Load, alone: Load) -> dict[str, Any]:
    return {
        "model": case.name,
        "server": name,
        "clients": clients,
        "answers/s": f"{load.rate:.1f}",
        "p50": f"{load.p50 * 1000:.1f} ms",
        "p95": f"{load.p95 * 1000:.1f} ms",
        "of the bare session": f"{load.rate / alone.rate:.2f}",
    }


def memory(case: Served, threads: int) -> Iterator[dict[str, Any]]:
    """A server for each number of tasks, after each task has answered."""
    before: tuple[int, dict[str, float]] | None = None
    for count in COUNTS:
        port = free_port()
        with process(ours(case.many(count), port, threads, "--memory", "32GiB"), port) as running:
            headers = {"content-type": case.content_type}
            for number in range(count):
                url = f"http://127.0.0.1:{port}/models/task-{number:03}"
                httpx.post(url, content=case.bodies()[0], headers=headers, timeout=_START).raise_for_status()
            sizes = sizes_of(running.pid)
        before = before or (count, sizes)
        more = count - before[0]
        each = {name: f"{(sizes[name] - before[1][name]) / more:.2f} MB" if more else "-" for name in sizes}
        yield {
            "model": case.name,
            "tasks": count,
            **{name: f"{size:.0f} MB" for name, size in sizes.items()},
            **{f"a further task, {name}": size for name, size in each.items()},
        }


def sizes_of(pid: int) -> dict[str, float]:
    """Memory of a process now, in MB: what no other process has, and the part of it that no file backs.

    Not its peak, which a child of `fork` has from its parent, and which the opening of a graph determines.
    """
    found = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = {key: int(size) for key, size in re.findall(r"^(\w+): +(\d+) kB", found, re.MULTILINE)}
    unique = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"unique": unique * 1024 / 1e6, "anonymous": kib["Anonymous"] * 1024 / 1e6}


def show(title: str, found: Iterator[dict[str, Any]]) -> None:
    """A table, and a line in the file for each row as soon as it is measured."""
    rows = []
    for row in found:
        rows.append(row)
        with RESULTS.open("a") as file:
            file.write(json.dumps({"time": time.strftime("%FT%T"), "part": title, **row}) + "\n")
    table = Table(*rows[0], box=box.MARKDOWN)
    for row in rows:
        table.add_row(*map(str, row.values()))
    print(f"\n{title}:")
    Console(width=200).print(table)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="by default both")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--short", action="store_true", help="smaller models")
    options = parser.parse_args()
    parts = options.part or PARTS
    for case in SHORT if options.short else REAL:
        make(case, COUNTS if "memory" in parts else ())
        if "rate" in parts:
            show("rate", rates(case, options.seconds, options.threads))
        if "memory" in parts:
            show("memory", memory(case, options.threads))


if __name__ == "__main__":
    main()
