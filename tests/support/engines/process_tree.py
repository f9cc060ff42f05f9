"""What Linux tells of processes, any of which may end while it is read."""

from pathlib import Path


def runs(pid: int) -> bool:
    """Whether a process runs; one that has ended, and whose parent does not know yet, does not."""
    try:
        return _stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends within the read
        return False


def parent_of(pid: int) -> int:
    """The parent of a process that runs."""
    return int(_stat(pid)[1])


def children_of(pid: int) -> list[int]:
    """The children of all threads of a process; none if it has ended."""
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def descendants_of(pid: int) -> list[int]:
    """A process, and all that it and they have started."""
    pids = [pid]
    for one in pids:
        pids += children_of(one)
    return pids


def command_of(pid: int) -> str:
    """The command line of a process, its arguments separated by zeros; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def resident(pid: int) -> int:
    """Bytes of a process in memory; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS")), 0)


def _stat(pid: int) -> list[str]:
    """State, parent and what follows."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
