"""The command `peanut-serve classify`: what it refuses, and a stop under load that loses nothing."""

import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.classify.serving import PATIENCE
from support.classify.stand_ins import stand_in
from support.commands import Run
from support.paths import ROOT
from support.server.certificates import self_signed


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


def test_certificates_that_cannot_be_used(tmp_path: Path, run_here: Run) -> None:
    folder = stand_in(tmp_path / "mood")
    good, other = self_signed(tmp_path / "good"), self_signed(tmp_path / "other")
    locked = self_signed(tmp_path / "locked", b"passphrase")
    none = tmp_path / "none"
    wrong: list[tuple[Path | None, Path | None, str]] = [
        (none, None, f"--ssl-certfile {none} cannot be used: No such file"),
        (good.certfile, none, f"with the key {none} cannot be used: No such file"),
        (good.certfile, other.keyfile, "cannot be used: KEY_VALUES_MISMATCH"),
        (locked.certfile, locked.keyfile, "without a passphrase"),
        (good.certfile, None, f"--ssl-certfile {good.certfile} cannot be used: "),
        (None, good.keyfile, "--ssl-keyfile is given without --ssl-certfile; give both"),
    ]
    for certfile, keyfile, said in wrong:
        files = [
            *(("--ssl-certfile", certfile) if certfile else ()),
            *(("--ssl-keyfile", keyfile) if keyfile else ()),
        ]
        done = run_here("peanut-serve", "classify", folder, *files)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert done.stderr.startswith("peanut-serve classify: ")
        assert said in done.stderr


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
    """The command on a free port, listening: the process and its port."""
    command = [sys.executable, "-c", "from peanut_serve.cli import main; main()", "classify", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        [*command, "--port", "0", "--threads", "1"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        found = re.fullmatch(r"serving .* on https?://127\.0\.0\.1:(\d+)\n", line)
        assert found, line
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
        wait_ready(port)
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


@pytest.mark.slow  # a process
@pytest.mark.parametrize("is_joined", [False, True])
def test_the_address_has_tls(tmp_path: Path, is_joined: bool) -> None:
    """With the key in a file of its own, and in that of the certificate."""
    certificate = self_signed(tmp_path / "tls")
    certfile, keyfile = certificate.certfile, certificate.keyfile
    assert keyfile is not None
    files = ["--ssl-certfile", certfile, "--ssl-keyfile", keyfile]
    if is_joined:
        joined = tmp_path / "joined.pem"
        joined.write_bytes(certfile.read_bytes() + keyfile.read_bytes())
        files = ["--ssl-certfile", joined]
    with process(stand_in(tmp_path / "mood"), "--api-key", "a-key", *files) as (running, port):
        trust = ssl.create_default_context(cafile=certfile)
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust, timeout=PATIENCE) as client:
            assert client.get("/models").status_code == 401
            assert client.get("/models", headers={"Authorization": "Bearer a-key"}).json() == ["mood"]
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"https://127.0.0.1:{port}/health", timeout=PATIENCE)
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE)
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE) == 0
