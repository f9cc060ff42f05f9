"""After SIGKILL of any process of a server, at any moment, nothing of it is left: processes, memory, sockets."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.engines.serving import PROGRAM, environment, free_port
from support.paths import ROOT

SOAK = "PEANUT_SOAK" in os.environ
SHM = Path("/dev/shm")

# a server, an engine and workers as vLLM starts them, with shared memory and sockets, but without a model
SERVER = """
import multiprocessing, os, sys, time
from multiprocessing.shared_memory import SharedMemory

def worker(ready):
    from peanut_serve.vllm_plugin.processes import end_with_parent
    end_with_parent()
    memory = SharedMemory(create=True, size=1 << 20)
    ready.wait()
    sum(range(10**12))  # busy, as a worker may be: no other thread of Python runs

def engine(ready):
    from peanut_serve.vllm_plugin.processes import end_with_parent
    end_with_parent()
    end_with_parent()  # vLLM loads plugins twice
    memory = SharedMemory(create=True, size=1 << 20)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=worker, args=(ready,)) for _ in range(2)]
    for one in workers:
        one.start()
    ready.wait()
    time.sleep(1000)

if __name__ == "__main__":
    from peanut_serve.vllm_plugin.processes import own_everything
    own_everything()
    import socket
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.environ["VLLM_RPC_BASE_PATH"] + "/socket")
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(4)
    process = context.Process(target=engine, args=(ready,))
    process.start()
    ready.wait()
    import gc
    gc.collect()
    print("READY", flush=True)
    time.sleep(float(sys.argv[1]))
    process.terminate()  # its workers get no signal
    sys.exit(0)
"""

# a process that has not come to loading the plugin: it only ran the script of the command again, as Python has it do
IMPORTING = """
from peanut_serve.cli import main
import multiprocessing, time

if __name__ == "__main__":
    from peanut_serve.vllm_plugin.processes import own_everything
    own_everything()
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1000,))
    child.start()
    time.sleep(5)  # long enough to import the command
    print("READY", flush=True)
    time.sleep(1000)
"""


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


def test_memory_is_abandoned_when_its_last_process_ended() -> None:
    """The check of the real server below: what a living process holds is not taken for a leak."""
    script = """
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=4096)
resource_tracker.unregister(memory._name, "shared_memory")
print(memory.name, flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    segment = SHM / process.stdout.readline().strip()
    assert segment.exists()
    assert segment not in abandoned()
    process.kill()
    process.communicate(timeout=10)
    assert segment in abandoned()
    segment.unlink()


@pytest.fixture
def server_script(tmp_path: Path) -> Path:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    return script


def start(script: Path, seconds: float = 100) -> "subprocess.Popen[str]":
    command = [sys.executable, script, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT)


def started(script: Path) -> "subprocess.Popen[str]":
    """A server whose processes all run."""
    server = start(script)
    assert server.stdout is not None
    assert server.stdout.readline() == "READY\n"
    return server


@pytest.mark.kills
@pytest.mark.timeout(300)
def test_many_kills(server_script: Path) -> None:
    """While the processes start, and while they run. (20 times in `make soak`.)"""
    generator = random.Random(0)
    for number in range(20 if SOAK else 6):
        server = start(server_script)
        assert server.stdout is not None
        if number % 2:
            assert server.stdout.readline() == "READY\n"
            memory = left_of(server.pid)
            assert len([path for path in memory if path.startswith("/dev/shm")]) == 3
        else:
            time.sleep(generator.random() * 1.5)
        os.kill(server.pid, signal.SIGKILL)
        server.wait(10)
        # the resource tracker of Python, which is in the session too, ends with the last of them
        assert until(lambda: processes(server.pid) == {}, 20), processes(server.pid)  # noqa: B023
        server.stdout.close()
        assert until(lambda: left_of(server.pid) == [], 20), left_of(server.pid)  # noqa: B023


@pytest.mark.kills
@pytest.mark.timeout(120)
def test_a_start_removes_what_others_have_left(server_script: Path) -> None:
    """If even the process that cleans up was killed. A server that ends by itself leaves nothing, at once."""
    first = started(server_script)
    time.sleep(2)
    assert any(path.startswith(tempfile.gettempdir()) for path in left_of(first.pid))  # it does not come too early
    cleaner = next(pid for pid in children_of(first.pid) if "peanut-serve-cleaner" in command_of(pid))
    os.kill(cleaner, signal.SIGKILL)
    first.kill()
    first.communicate(timeout=20)
    assert until(lambda: processes(first.pid) == {}, 20)
    assert left_of(first.pid) != []
    second = start(server_script, 0)
    second.communicate(timeout=60)
    assert until(lambda: processes(second.pid) == {}, 20), processes(second.pid)
    assert left_of(first.pid) == left_of(second.pid) == []


@pytest.mark.kills
@pytest.mark.timeout(120)
def test_an_engine_that_is_killed_takes_its_workers_along(server_script: Path) -> None:
    server = started(server_script)
    spawned = {pid for pid, command in processes(server.pid).items() if "spawn_main" in command}
    assert len(spawned) == 3
    engine = next(pid for pid in spawned if parent_of(pid) == server.pid)
    os.kill(engine, signal.SIGKILL)
    assert until(lambda: not spawned & processes(server.pid).keys(), 20)
    server.kill()
    server.communicate(timeout=20)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_a_process_that_still_imports_ends_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(IMPORTING)
    server = start(script)
    assert server.stdout is not None
    assert server.stdout.readline() == "READY\n"
    assert len(processes(server.pid)) >= 2
    server.kill()
    server.wait(10)
    assert until(lambda: processes(server.pid) == {}, 20), processes(server.pid)
    assert until(lambda: left_of(server.pid) == [], 10), left_of(server.pid)


def servers(folder: Path, smollm2: Path, mode: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Real servers, each in a session of its own."""
    (folder / "tasks").mkdir()
    shutil.copytree(ROOT / "examples" / "adapters" / "smollm2-json", folder / "tasks" / "json")
    while True:
        command = [
            PROGRAM, "--base", smollm2, "--adapters", folder / "tasks", "--mode", mode, "--state", folder / "state",
            "--port", free_port(), "--enforce-eager", "--max-model-len", "256", "--preload", "json",
        ]  # fmt: skip
        with (folder / "log").open("wb") as log:
            yield subprocess.Popen(
                list(map(str, command)),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(folder),
                start_new_session=True,
                cwd=ROOT,
            )


@pytest.mark.vllm
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("mode", ["merged", "lora", "auto"] if SOAK else ["merged"])
def test_kills_of_the_real_server(smollm2: Path, tmp_path: Path, mode: str) -> None:
    """When it has just started its engine, and when it serves. (20 times at random moments in `make soak`.)"""
    before = abandoned()
    generator, log = random.Random(1), tmp_path / "log"
    kills = 20 if SOAK else 2
    for number, server in enumerate(servers(tmp_path, smollm2, mode)):
        if number == kills:
            server.kill()
            server.wait(10)
            break
        wanted = r"Application startup complete" if number % 2 else r"EngineCore.*Initializing a V1 LLM engine"
        seen = until(lambda: re.search(wanted, log.read_text()) is not None, 300)  # noqa: B023
        assert seen, log.read_text()[-3000:]
        time.sleep(generator.random() * (10 if SOAK else 1))
        assert len(processes(server.pid)) >= 2
        server.kill()
        server.wait(10)
        assert until(lambda: processes(server.pid) == {}, 30), processes(server.pid)  # noqa: B023
        assert until(lambda: left_of(server.pid) == [], 10), left_of(server.pid)  # noqa: B023
        # what a process beside this one leaves when it ends is removed by Python's tracker, which takes a while
        assert until(lambda: abandoned() <= before, 60), abandoned() - before


@pytest.mark.vllm
def test_a_server_stops_while_its_engine_restarts(smollm2: Path, tmp_path: Path) -> None:
    """It does not wait until the new engine runs, only to end it."""
    server, log = next(servers(tmp_path, smollm2, "merged")), tmp_path / "log"
    try:
        assert until(lambda: "Application startup complete" in log.read_text(), 300), log.read_text()[-3000:]
        engine = next(pid for pid, command in processes(server.pid).items() if command.startswith("VLLM::EngineCore"))
        os.kill(engine, signal.SIGKILL)
        assert until(lambda: "restarting the engine" in log.read_text(), 60), log.read_text()[-3000:]
        assert until(lambda: len(processes(server.pid)) >= 3, 60)  # the tracker of resources, and a new engine
        server.send_signal(signal.SIGTERM)
        server.wait(120)
    finally:
        server.kill()
    assert log.read_text().count("init engine (profile") == 1  # that of the first one
    assert until(lambda: processes(server.pid) == {}, 30), processes(server.pid)
    assert until(lambda: left_of(server.pid) == [], 10), left_of(server.pid)
