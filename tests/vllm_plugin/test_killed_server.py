"""After SIGKILL of the real server nothing of it is left, and SIGTERM ends it while its engine restarts."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engines.remains import SHM, abandoned, left_of, processes, until
from support.engines.serving import PROGRAM, environment, free_port
from support.paths import ROOT

SOAK = "PEANUT_SOAK" in os.environ


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
        seen = until(lambda: re.search(wanted, log.read_text()) is not None, 900)  # noqa: B023
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
        assert until(lambda: "Application startup complete" in log.read_text(), 900), log.read_text()[-3000:]
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
