"""The picture of benchmarks/merge.py: python benchmarks/plot_merge.py RESULTS.jsonl OUT.png"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLOURS = {"copy": "0.6", "peanut-merge": "tab:green", "PEFT": "tab:orange", "mergekit (no PEANuT)": "tab:blue"}


def plot(results: Path, output: Path) -> None:
    """Wall times as bars, a picture for each state of the page cache; time and memory over the checkpoint's size."""
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    cases = [case for _, case in sorted({(entry["bytes"], entry["case"]) for entry in entries})]
    caches = [cache for cache in ("warm", "cold") if any(entry["cache"] == cache for entry in entries)]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for axis, cache in zip(axes[0], caches, strict=False):
        for position, (name, colour) in enumerate(COLOURS.items()):
            walls = {case: values(entries, "wall", case, cache, name) for case in cases}
            shown = [case for case in cases if walls[case]]
            at = [cases.index(case) + 0.2 * position for case in shown]
            bars = axis.bar(at, [statistics.median(walls[case]) for case in shown], 0.19, color=colour, label=name)
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        axis.set(yscale="log", ylabel="seconds", title=f"wall time, {cache} page cache")
        axis.set_xticks(
            [i + 0.2 for i in range(len(cases))], [case.replace(", ", "\n") for case in cases], fontsize=8
        )
    for axis, field, unit, title, names in (
        (axes[1, 0], "wall", "seconds", "wall time of every run", list(COLOURS)),
        (axes[1, 1], "peak_anonymous", "MB", "peak anonymous memory of every run", list(COLOURS)[1:]),
    ):
        for name in names:
            points = [(e["bytes"] / 1e9, e[field]) for e in entries if e["contender"] == name]
            if points:
                axis.plot(*zip(*points, strict=True), "o", markersize=4, color=COLOURS[name], label=name)
        axis.set(xscale="log", yscale="log", xlabel="checkpoint, GB", ylabel=unit, title=title)
    axes[1, 0].legend(fontsize=8)
    figure.savefig(output, dpi=80)


def values(entries: list[dict], field: str, case: str, cache: str, contender: str) -> list[float]:
    """One figure of every run of one kind."""
    wanted = (case, cache, contender)
    return [e[field] for e in entries if (e["case"], e["cache"], e["contender"]) == wanted]


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
