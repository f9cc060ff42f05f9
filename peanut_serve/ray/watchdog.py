"""Runs a command for a replica and ends it with everything it started, however the replica ends.

    python -m peanut_serve.ray.watchdog GRACE COMMAND...

Standard input is a pipe from the replica. When it ends, because the replica closed it or was killed, the command gets
SIGTERM, and SIGKILL after GRACE seconds. So does what it left behind: the kernel makes this process the parent of
every descendant whose own parent has ended. Only the standard library is imported, so that this starts at once.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl(2)
_PR_SET_CHILD_SUBREAPER = 36
_LOOK = 0.05  # seconds between two looks at what is left
_BY_ITSELF = 3.0  # seconds for what is left to end: among it is what removes the shared memory of a killed server


def main(arguments: Sequence[str]) -> int:
    """Run until the command or the replica has ended; the command's exit status."""
    grace, command = float(arguments[0]), arguments[1:]
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the replica decides
    # a group of its own; this process has one thread, so that preexec_fn is safe
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, 9)
    )
    exited = os.pidfd_open(process.pid)
    ready, _, _ = select.select([sys.stdin.buffer, exited], [], [])
    if exited not in ready:
        _signal_group(process.pid, signal.SIGTERM)
        select.select([exited], [], [], grace)
    _signal_group(process.pid, signal.SIGKILL)
    status = process.wait()
    _end_descendants()
    return status if status >= 0 else 128 - status


def _end_descendants() -> None:
    """Kill and reap until this process has no child: those of a killed one become children of this process."""
    deadline = time.monotonic() + _BY_ITSELF
    while children := _children():
        for child in children:
            try:
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, os.WNOHANG)
            except (ProcessLookupError, ChildProcessError):
                continue
        time.sleep(_LOOK)


def _children() -> list[int]:
    own = os.getpid()
    return list(map(int, Path(f"/proc/self/task/{own}/children").read_text().split()))


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
