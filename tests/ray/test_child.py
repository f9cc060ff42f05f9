"""A replica's server process: nothing that it started outlives it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.engines.process_tree import parent_of, runs
from support.engines.remains import until

from peanut_serve.errors import EngineStartError
from peanut_serve.ray.child import Child, free_port

SERVER = """
import http.server, subprocess, sys, signal, pathlib
if sys.argv[3:] == ["stubborn"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
# a grandchild in a session of its own, as no group reaches it
grandchild = subprocess.Popen(["sleep", "600"], start_new_session=True)
# what peanut_serve.vllm_plugin.processes starts: it removes what a killed server has left
left = pathlib.Path(sys.argv[2] + ".left")
left.touch()
cleaner = ["sh", "-c", 'cat > /dev/null; sleep 1; rm -f "$1"', "cleaner", left]
kept_open = subprocess.Popen(cleaner, stdin=subprocess.PIPE, start_new_session=True)
pathlib.Path(sys.argv[2]).write_text(str(grandchild.pid))
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


class Started:
    """A child whose grandchild is known."""

    def __init__(self, folder: Path, *arguments: str, grace: float = 20.0) -> None:
        self.pids, port = folder / "pids", free_port()
        command = [sys.executable, "-c", SERVER, str(port), str(self.pids), *arguments]
        self.child = Child.start(command, {}, folder / "log", port=port, grace=grace)

    def grandchild(self) -> int:
        return int(self.pids.read_text())

    def has_left_something(self) -> bool:
        return self.pids.with_name("pids.left").exists()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    child = Started(tmp_path)
    asyncio.run(child.child.wait_until_ready(within=60))
    yield child
    asyncio.run(child.child.stop())


def test_a_stop_ends_what_the_server_started(started: Started) -> None:
    assert httpx.get(started.child.address).status_code == 200
    asyncio.run(started.child.stop())
    assert started.child.exit_status is not None
    assert not runs(started.grandchild())
    with pytest.raises(httpx.ConnectError):
        httpx.get(started.child.address)


def test_a_server_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    stubborn = Started(tmp_path, "stubborn", grace=0.2)
    asyncio.run(stubborn.child.wait_until_ready(within=60))
    asyncio.run(stubborn.child.stop())
    assert stubborn.child.exit_status == 128 + signal.SIGKILL
    assert not runs(stubborn.grandchild())
    assert not stubborn.has_left_something()


def test_nothing_is_left_when_the_replica_is_killed(tmp_path: Path) -> None:
    replica = f"""
import asyncio, sys
from pathlib import Path
sys.path[:0] = {sys.path!r}
from test_child import Started
started = Started(Path({str(tmp_path)!r}))
asyncio.run(started.child.wait_until_ready(within=60))
print("ready", flush=True)
asyncio.run(asyncio.sleep(600))
"""
    process = subprocess.Popen([sys.executable, "-c", replica], stdout=subprocess.PIPE, cwd=Path(__file__).parent)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    grandchild = int((tmp_path / "pids").read_text())
    assert runs(grandchild)
    process.kill()
    process.wait(10)
    assert until(lambda: not runs(grandchild), 30)
    assert not (tmp_path / "pids.left").exists()


def test_nothing_is_left_when_the_server_is_killed(started: Started) -> None:
    server = parent_of(started.grandchild())
    os.kill(server, signal.SIGKILL)
    assert until(lambda: started.child.exit_status is not None, 30)
    assert started.child.exit_status == 128 + signal.SIGKILL
    assert not runs(started.grandchild())
    assert not started.has_left_something()


def test_a_start_that_fails_is_reported_with_the_last_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; [print(i) for i in range(99)]; sys.exit('no such base')"]
    child = Child.start(command, {}, tmp_path / "log", port=free_port())
    with pytest.raises(EngineStartError, match="status 1") as error:
        asyncio.run(child.wait_until_ready(within=60))
    assert "no such base" in str(error.value)
    assert "\n98\n" in str(error.value)
    assert "\n50\n" not in str(error.value)


def test_a_start_that_hangs_is_ended(tmp_path: Path) -> None:
    child = Child.start(["sleep", "600"], {}, tmp_path / "log", port=free_port())
    with pytest.raises(EngineStartError, match="not ready within 0.5 s"):
        asyncio.run(child.wait_until_ready(within=0.5))
    assert child.exit_status is not None
