"""A fleet of fake engines on Ray Serve in this process, with its admin API."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from support.engines.remains import until
from support.fleet import fake_server

from peanut_serve.cli.ctl import command as ctl_command
from peanut_serve.ray.app import build
from peanut_serve.ray.child import free_port

ADMIN_KEY = "an-admin-key"
REPLICAS = 2
Ctl = Callable[..., tuple[int, str, str]]


class OperatedFleet:
    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder, self.state = address, folder, folder / "state"
        self.client = httpx.Client(base_url=address, timeout=120, headers={"Authorization": f"Bearer {ADMIN_KEY}"})

    def admin(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return self.client.request(method, f"/admin/v1{path}", json=body)

    def report(self) -> dict[str, Any]:
        return self.admin("GET", "/fleet").json()

    def up(self) -> int:
        """How many replicas answer."""
        return sum(one["status"] == 200 for one in self.report()["replicas"])

    def files(self, **digests: str) -> None:
        """The versions that the files of variants have from now on; those of others stay."""
        file = self.folder / "files.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, **digests}))

    def engines(self) -> dict[str, int]:
        """The state folder of each engine that runs, and its process."""
        found = {}
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                arguments = command.read_text().split("\0")
            except OSError:
                continue
            if str(self.folder / "journal") in arguments and "peanut_serve.ray.watchdog" not in arguments:
                found[Path(arguments[arguments.index("--state") + 1]).name] = int(command.parent.name)
        return found

    def restart(self, number: str, is_empty: bool = True) -> None:
        """Kill an engine, and wait until another replica has its state folder; before, that may be emptied."""
        before = self.engines()
        if is_empty:
            shutil.rmtree(self.state / number / "theta")
            (self.state / number / "records.json").unlink()
        os.kill(before[number], signal.SIGKILL)
        assert until(lambda: self.engines().get(number) not in (None, before[number]), 120)
        assert until(lambda: self.up() == REPLICAS, 120)

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.state / "audit.jsonl").read_text().splitlines()]


@contextmanager
def operated(folder: Path) -> Iterator[str]:
    """The address of a fleet with its files in a folder."""
    port = free_port()
    (folder / "admin").write_text(ADMIN_KEY)
    os.environ |= {"RAY_worker_niceness": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120"}
    engine = {
        "command": [sys.executable, fake_server.__file__],
        "options": ["--swap", "0", "--journal", str(folder / "journal")],
    }
    ray.init("local", num_cpus=8, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        serve.start(http_options={"port": port}, logging_config={"log_level": "ERROR"})
        files = {"admin_key_file": str(folder / "admin"), "logs": str(folder)}
        serve.run(build({"engine": engine, "replicas": REPLICAS, "cpus": 0.1, **files}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def ctl_for(
    fleet: OperatedFleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *first: str
) -> Ctl:
    """`peanut-serve ctl` for a fleet: its exit status, and what it printed on stdout and stderr."""
    monkeypatch.setenv("PEANUT_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setenv("PEANUT_ADMIN_URL", fleet.address)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            ctl_command.main([*first, *arguments])
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call
