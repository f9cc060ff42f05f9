"""How fast exported graphs load, run and change tasks, beside the merged model in torch."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageClassification

from converters.inference.session import LoadedAdapter, Session

THREADS = 2
BATCHES = (1, 8)
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]
# a row as it is shown, and the figures behind it
Row = tuple[dict[str, str], dict[str, Any]]


@dataclass(frozen=True)
class Contender:
    """A way to run one task; `load` brings it from the disk."""

    name: str
    load: Callable[[], Run]


def torch_model(folder: Path) -> Contender:
    """The merged checkpoint as transformers gives it."""

    def load() -> Run:
        """Open it, and the function that runs it."""
        model = AutoModelForImageClassification.from_pretrained(folder).eval()

        @torch.inference_mode()
        def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = model(pixel_values=torch.from_numpy(pixels)).logits.numpy()
            return logits

        return run

    return Contender("torch", load)


def onnx_model(name: str, model: Path, adapter: Path | None = None) -> Contender:
    """A graph in ONNX Runtime, perhaps with an adapter."""

    def load() -> Run:
        session = Session(model, THREADS)
        loaded = LoadedAdapter(adapter) if adapter else None
        return lambda pixels: session.run({"pixel_values": pixels}, loaded)

    return Contender(name, load)


def latencies(contenders: Sequence[Contender], standard: str, shape: tuple[int, ...], runs: int) -> Iterator[Row]:
    """Loading and runs of all contenders, which take turns; ratios are to the one called `standard`.

    The first one's output is what the others are held against.
    """
    torch.set_num_threads(THREADS)
    seconds: dict[str, dict[str, list[float]]] = {one.name: defaultdict(list) for one in contenders}
    ready: dict[str, Run] = {}
    for _ in range(max(1, runs // 3)):
        for one in contenders:
            ready.pop(one.name, None)
            start = time.perf_counter()
            ready[one.name] = one.load()
            seconds[one.name]["load"].append(time.perf_counter() - start)
    pixels = {batch: images(batch, shape) for batch in BATCHES}
    outputs = {name: run(pixels[BATCHES[-1]]) for name, run in ready.items()}
    for _ in range(runs):
        for name, run in ready.items():
            for batch in BATCHES:
                run(pixels[1])  # while the threads of the one before fall asleep
                start = time.perf_counter()
                run(pixels[batch])
                seconds[name][f"batch {batch}"].append(time.perf_counter() - start)
    wanted = outputs[contenders[0].name]
    medians = {name: {kind: statistics.median(took) for kind, took in all_.items()} for name, all_ in seconds.items()}
    for name, took in medians.items():
        row = {"": name, "load": milliseconds(took["load"])}
        for kind in (f"batch {batch}" for batch in BATCHES):
            row |= {kind: milliseconds(took[kind]), f"{kind}, of {standard}'s": ratio(took, medians[standard], kind)}
        difference = float(np.abs(outputs[name] - wanted).max())
        row["largest difference to torch"] = f"{difference:.1e}"
        yield row, {"seconds": seconds[name], "difference": difference, "largest": float(np.abs(wanted).max())}


def swaps(model: Path, merged: Path, adapters: Sequence[Path], shape: tuple[int, ...], count: int) -> Iterator[Row]:
    """From task to task in one session of a swappable graph; and, instead, loading another merged graph."""
    session, pixels = Session(model, THREADS), {"pixel_values": images(1, shape)}
    seconds: dict[str, list[float]] = defaultdict(list)

    def run(adapter: LoadedAdapter) -> float:
        start = time.perf_counter()
        session.run(pixels, adapter)
        return time.perf_counter() - start

    for file in islice(_cycle(adapters), count):
        start = time.perf_counter()
        adapter = LoadedAdapter(file)
        seconds["loading the adapter file"].append(time.perf_counter() - start)
        first, second, third = run(adapter), run(adapter), run(adapter)
        seconds["first run after it"].append(first)
        seconds["next run"].append(second)
        seconds["first run less the next"].append(first - second)
        seconds["without a switch: next run less the one after"].append(second - third)
    for _ in range(max(1, count // 10)):
        start = time.perf_counter()
        Session(merged, THREADS)
        seconds["instead: a session of another merged graph"].append(time.perf_counter() - start)
    for name, took in seconds.items():
        low, _, high = statistics.quantiles(took, n=4) if len(took) > 1 else took * 3
        row = {"": name, "median": milliseconds(statistics.median(took))}
        row |= {"quarters": f"{milliseconds(low)} to {milliseconds(high)}"}
        yield row, {"seconds": took}


def images(batch: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Random pixels, the same every time."""
    return np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)


def milliseconds(seconds: float) -> str:
    """Three digits or so."""
    return f"{seconds * 1e3:.0f} ms" if seconds > 0.1 else f"{seconds * 1e3:.2f} ms"


def ratio(one: dict[str, float], other: dict[str, float], kind: str) -> str:
    """Of the same kind of seconds."""
    return f"{one[kind] / other[kind]:.2f}"


def _cycle(files: Sequence[Path]) -> Iterator[Path]:
    while True:
        yield from files
