"""After SIGKILL of any process of a server, at any moment, nothing of it is left: processes, memory, sockets."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support.engines.process_tree import children_of, command_of, parent_of
from support.engines.remains import left_of, processes, until
from support.paths import ROOT

SOAK = "PEANUT_SOAK" in os.environ

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


@pytest.mark.kills
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
