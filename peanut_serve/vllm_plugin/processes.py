"""Nothing outlives the server: its processes, their shared memory and their sockets, even after SIGKILL.

vLLM starts an engine process, which starts workers. If the server is killed, they would keep running, with the memory
of the GPU. Here the kernel kills each of them when its parent ends, and a small process removes what the server has
left. Everything is found by the server's process id in its name. Should the small process be killed as well, the next
server removes it.
"""

import atexit
import fcntl
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path

_SERVER = "PEANUT_SERVER_PID"  # set for every process of a server
_SHARED_MEMORY = Path("/dev/shm")
_SHM_PREFIX = "pnt"  # Python allows 14 characters in all, which leaves room for a random part
_FOLDER_PREFIX = "peanut-serve-"
_F_SETSIG = 10  # fcntl(2); the module fcntl does not have it

# waits until the server has ended, then until its processes have, and removes what they have left
_CLEANER = """
cat > /dev/null
sleep 1
rm -rf -- "$1" "$2"*
"""

_cleaners: list["subprocess.Popen[bytes]"] = []  # kept, as their standard input has to stay open


def own_everything() -> None:
    """Called in the server's process, before vLLM starts others: they put their sockets and memory where it is found.

    Removes what servers that no longer run have left.
    """
    for pid in _servers():
        if not Path(f"/proc/{pid}").exists():
            _remove_remains(pid)
    pid = os.getpid()
    os.environ[_SERVER] = str(pid)
    folder = tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{pid}-")  # only this user can open it
    os.environ.setdefault("VLLM_RPC_BASE_PATH", folder)
    _name_shared_memory(pid)
    # its standard input is a pipe that ends with this process; a terminal's signals do not reach a new session
    command = ["sh", "-c", _CLEANER, "peanut-serve-cleaner", folder, str(_SHARED_MEMORY / _segments(pid))]
    quiet = subprocess.DEVNULL
    _cleaners.append(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True, cwd="/")
    )
    atexit.register(_remove_folders, pid)


def end_with_parent() -> None:
    """Called in every process of vLLM: the kernel kills it as soon as its parent has ended, whatever it is doing."""
    server, parent = os.environ.get(_SERVER), multiprocessing.parent_process()
    if server is None or parent is None:
        return
    _name_shared_memory(int(server))
    pipe = parent.sentinel  # its other end is held by the parent alone
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # it ended before this was set up
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_server() -> None:
    """Called first in every process that multiprocessing starts: kill it as soon as the server has ended.

    `end_with_parent` can be called only when the process has imported what it needs, which takes long on a busy
    machine: until then multiprocessing knows no parent, and reads from the pipe. In the server this does nothing.
    """
    server = os.environ.get(_SERVER)
    if server is None or "--multiprocessing-fork" not in sys.orig_argv:
        return
    try:
        ended = os.pidfd_open(int(server))
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    except OSError:  # a kernel before Linux 5.3: end_with_parent has to do
        return
    threading.Thread(target=_end_after, args=(ended,), name="end-with-server", daemon=True).start()


def _end_after(process: int) -> None:
    """Wait until the process of a pidfd has ended, and end this one."""
    select.select([process], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def _name_shared_memory(pid: int) -> None:
    """Give the segments that this process creates a name with the server's process id."""
    shared_memory._SHM_NAME_PREFIX = f"/{_segments(pid)}"  # type: ignore[attr-defined]


def _segments(pid: int) -> str:
    return f"{_SHM_PREFIX}{pid:x}_"


def _remove_remains(pid: int) -> None:
    """Remove the sockets and the shared memory of a server that was killed."""
    _remove_folders(pid)
    for segment in _SHARED_MEMORY.glob(f"{_segments(pid)}*"):
        segment.unlink(missing_ok=True)


def _remove_folders(pid: int) -> None:
    """Remove the sockets. Python's resource tracker removes the shared memory of a server that ends by itself."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}{pid}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _servers() -> Iterator[int]:
    """Process ids of servers that have left something, or still run."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*-*"):
        number = folder.name.removeprefix(_FOLDER_PREFIX).split("-")[0]
        if number.isdecimal():
            yield int(number)
