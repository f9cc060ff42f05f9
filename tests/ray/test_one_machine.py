"""A fleet in the foreground of one machine, with fake engines: it serves, and nothing outlives it."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.engines.remains import until
from support.fleet import fake_server

from peanut_serve.ray.child import free_port
from peanut_serve.ray.settings import FleetSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SERVE = """
import sys
from peanut_serve.errors import EngineStartError
from peanut_serve.ray.one_machine import serve_here
from peanut_serve.ray.settings import FleetSettings
try:
    serve_here(FleetSettings.model_validate_json(sys.argv[1]), "127.0.0.1", int(sys.argv[2]))
except EngineStartError as error:
    sys.exit(str(error))
"""


class Foreground:
    """The process, and everything that it starts: each has its mark in the environment."""

    def __init__(self, folder: Path, command: list[str], **variables: str) -> None:
        self.mark, self.port = uuid.uuid4().hex, free_port()
        engine = {"command": command, "options": ["--swap", "0", "--journal", str(folder / "journal")]}
        settings = FleetSettings.model_validate({"engine": engine, "replicas": 2, "cpus": 0.1, "logs": folder})
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, settings.model_dump_json(), str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TEST_MARK": self.mark, "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120"} | variables,
        )

    def living(self) -> list[str]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found


# the first engine that starts finds that another program was given its port
TAKEN = """
import pathlib, runpy, sys
first = pathlib.Path(sys.argv.pop(1))
if not first.exists():
    first.touch()
    sys.exit("[Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use")
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[Foreground]:
    command = [sys.executable, "-c", TAKEN, str(tmp_path / "first"), fake_server.__file__]
    foreground = Foreground(tmp_path, command)
    yield foreground
    foreground.process.kill()
    foreground.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_and_leaves_nothing(fakes: Foreground, number: signal.Signals) -> None:
    assert fakes.process.stdout is not None
    assert "2 replicas serve on" in fakes.process.stdout.readline()
    answer = httpx.post(f"http://127.0.0.1:{fakes.port}/v1/completions", json={"model": "v1"}, timeout=60)
    assert answer.json()["variant"] == "v1"
    assert sum(fake_server.__file__ in one for one in fakes.living()) >= 2
    fakes.process.send_signal(number)
    assert fakes.process.wait(60) == 0
    assert until(lambda: not fakes.living(), 20), fakes.living()


def test_an_engine_that_does_not_start_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    foreground = Foreground(tmp_path, [sys.executable, "-c", "import sys; sys.exit('no such option')"])
    _, error = foreground.process.communicate(timeout=200)
    assert foreground.process.returncode == 1
    assert "the fleet did not start\n" in error
    assert error.endswith("the engine ended with status 1:\nno such option\n")
    assert until(lambda: not foreground.living(), 20), foreground.living()


def test_a_node_of_ray_that_does_not_start_is_told_in_a_sentence(tmp_path: Path) -> None:
    foreground = Foreground(tmp_path, [sys.executable, fake_server.__file__], RAY_TMPDIR="/proc/nothing")
    _, error = foreground.process.communicate(timeout=200)
    assert foreground.process.returncode == 1
    assert error.endswith("Ray did not start on this machine: [Errno 2] No such file or directory: '/proc/nothing'\n")
    assert "Traceback" not in error
