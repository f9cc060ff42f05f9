"""Whole-process cost of a command: wall time, CPU time, peak resident and peak anonymous memory."""

import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
    start = time.perf_counter()
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    anonymous = 0
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        anonymous = max(anonymous, _anonymous(child.pid))
        time.sleep(0.005)
    wall = time.perf_counter() - start
    output = child.stdout.read() if child.stdout else b""
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(output.decode(errors="replace")[-2000:])
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
