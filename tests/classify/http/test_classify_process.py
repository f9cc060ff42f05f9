"""The command `peanut-serve classify`: what it refuses, and a stop under load that loses nothing."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.classify.serving import PATIENCE
from support.classify.stand_ins import stand_in
from support.commands import Run
from support.paths import ROOT


def test_the_help_has_examples(run_here: Run) -> None:
    done = run_here("peanut-serve", "classify", "--help")
    assert done.returncode == 0
    for part in ("peanut-serve classify ./pets-onnx", "--max-delay", "--memory", "--api-key-file", "/openapi.json"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0 can be reached by others; give --api-key-file or --keys, or",
        ),
        (["--host", "example.org"], "can be reached by others"),
        (["--api-key-file", "/no/such/file"], "the keys in /no/such/file cannot be read"),
        (["--api-key", "two words"], "an API key is empty, or has spaces"),
        (["--memory", "much"], "'much' is not a valid size"),
        (["--memory", "base"], "--memory is base; expected a size like 4GiB"),
    ],
)
def test_options_that_are_not_safe_are_refused(tmp_path: Path, run_here: Run, options: list[str], said: str) -> None:
    done = run_here("peanut-serve", "classify", stand_in(tmp_path / "mood"), *options)
    assert done.returncode == 1
    assert done.stderr.startswith("peanut-serve classify: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_without_an_export_is_refused(tmp_path: Path, run_here: Run) -> None:
    done = run_here("peanut-serve", "classify", tmp_path)
    assert done.returncode == 1
    assert "contains no ONNX export; expected a folder that peanut-merge --format onnx wrote" in done.stderr


def test_a_port_that_is_taken_is_said_at_once(tmp_path: Path, run_here: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_here("peanut-serve", "classify", stand_in(tmp_path / "mood"), "--port", str(port))
    assert done.returncode == 1
    assert f"the server cannot listen on 127.0.0.1:{port}" in done.stderr


@contextmanager
def process(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command on a free port, ready: the process and its port."""
    command = [sys.executable, "-c", "from peanut_serve.cli import main; main()", "classify", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        [*command, "--port", "0", "--threads", "1"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        found = re.fullmatch(r"serving .* on http://127\.0\.0\.1:(\d+)\n", line)
        assert found, line
        wait_ready(int(found[1]))
        yield running, int(found[1])
    finally:
        running.kill()
        running.wait(30)


def wait_ready(port: int) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        try:
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise AssertionError("not ready")


class Client(threading.Thread):
    """Asks again and again on one connection, until it is told that there is no further answer on it."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self.statuses: list[int] = []
        self.lost: list[str] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        while True:
            try:
                connection.request(
                    "POST", "/models/mood", b'{"inputs": "good film"}', {"Content-Type": "application/json"}
                )
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException) as error:
                self.lost.append(repr(error))
                return
            self.statuses.append(response.status)
            if response.getheader("connection") == "close":
                return


@pytest.mark.slow  # a process, with a graph
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_under_load_loses_no_request(exports: Path, number: signal.Signals) -> None:
    with process(exports / "mood") as (running, port):
        clients = [Client(port) for _ in range(16)]
        for client in clients:
            client.start()
        until = time.monotonic() + PATIENCE
        while not all(client.statuses for client in clients):
            assert time.monotonic() < until
            time.sleep(0.05)
        running.send_signal(number)
        for client in clients:
            client.join(PATIENCE)
            assert not client.is_alive()
        assert [client.lost for client in clients if client.lost] == []
        assert {status for client in clients for status in client.statuses} == {200}
        assert running.wait(PATIENCE) == 0
        with pytest.raises(OSError, match="refused"):
            http.client.HTTPConnection("127.0.0.1", port, timeout=10).connect()
