"""What is left of a server that was killed: processes, shared memory, folders."""

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SHM = Path("/dev/shm")


def processes(session: int) -> dict[int, str]:
    """The processes of a session, by process id, without those that have ended."""
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal():
            continue
        try:
            state, _, _, of = (path / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            command = (path / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found[int(path.name)] = command
    return found


def left_of(pid: int) -> list[str]:
    """Shared memory and folders of a server."""
    folders = Path(tempfile.gettempdir()).glob(f"peanut-serve-{pid}-*")
    return [str(path) for path in [*SHM.glob(f"pnt{pid:x}_*"), *folders]]


def abandoned() -> set[Path]:
    """Shared memory under Python's own names that no living process has open; for ours, there is `left_of`."""
    segments = set(SHM.glob("psm_*"))  # before who holds them
    held = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it ended, or closed it
            held.add(link.readlink())
    return segments - held


def until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
