"""Whole-process cost of a command: wall time, CPU time, peak resident and peak anonymous memory.

    python benchmarks/measure.py COMMAND ...             (runs it, and prints its cost as JSON)

A process inherits the peak of the one that started it, which the kernel passes on with exec. So commands are started
by a small process, not by a benchmark that may have made a model before.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Seconds and megabytes (10^6 bytes) of one run."""

    wall: float
    cpu: float
    peak_rss: float  # ru_maxrss: includes mapped files
    peak_anonymous: float  # RssAnon, sampled: what swaps, what runs out


def measure(command: Sequence[str | Path]) -> Cost:
    """Run a command to its end. Raises `RuntimeError` with its output if it fails."""
    run = [sys.executable, "-S", __file__, *map(str, command)]
    done = subprocess.run(run, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return Cost(**json.loads(done.stdout))


def _measured(command: Sequence[str]) -> Cost:
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        anonymous = 0
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            anonymous = max(anonymous, _anonymous(child.pid))
            time.sleep(0.005)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            sys.exit(output.read().decode(errors="replace")[-2000:])
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6, anonymous / 1e6)


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def median(costs: Sequence[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(*(statistics.median(getattr(c, f) for c in costs) for f in Cost.__dataclass_fields__))


def machine() -> str:
    """Processor, cores and memory."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu.split(':')[1].strip()}, {os.cpu_count()} cores, {memory:.0f} GiB"


if __name__ == "__main__":
    print(json.dumps(asdict(_measured(sys.argv[1:]))))
