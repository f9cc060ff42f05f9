"""`peanut-serve deploy --local` in a process of its own, and everything that it starts."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
from support.engines.remains import abandoned, left_of, until
from support.engines.serving import environment, free_port
from support.fleet import fake_server

from peanut_serve.ray.settings import FleetSettings

ADMIN_KEY = "an-admin-key"
_SERVE = """
import sys
from peanut_serve.ray.one_machine import serve_here
from peanut_serve.ray.settings import FleetSettings
serve_here(FleetSettings.model_validate_json(sys.argv[1]), "127.0.0.1", int(sys.argv[2]))
"""
_DEPLOY = (sys.executable, "-c", "from peanut_serve.cli.main import main; main()", "deploy")
_LOOK = 1.0  # seconds between two looks at the processes
ENGINE, FRONT = "ServeReplica:peanut-serve:Engine", "ServeReplica:peanut-serve:Front"


class Family:
    """A process and all that descends from it, those included whose parent has ended.

    Each has the mark in its environment, unless it wrote over it; so children are looked for as well, all the time.
    """

    def __init__(self, mark: str, first: int) -> None:
        self._mark, self._seen = mark.encode(), {first: _start_of(first)}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._looking = threading.Thread(target=self._look_for_ever, daemon=True)
        self._looking.start()

    def _look_for_ever(self) -> None:
        while not self._over.wait(_LOOK):
            self.look()

    def look(self) -> None:
        """Find new members."""
        with self._lock:
            parents = dict[int, int]()
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    pid = int(folder.name)
                    parents[pid] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    if self._mark in (folder / "environ").read_bytes():
                        self._add([pid])
            while self._add(pid for pid, parent in parents.items() if self._lives(parent) and not self._lives(pid)):
                pass

    def _add(self, pids: Iterable[int]) -> bool:
        """Add those that run; whether there were any."""
        found = {pid: start for pid in list(pids) if (start := _start_of(pid))}
        self._seen |= found
        return bool(found)

    def _lives(self, pid: int) -> bool:
        return self._seen.get(pid, "") == _start_of(pid) != ""

    def living(self) -> dict[int, str]:
        """Those that run, with their command lines."""
        self.look()
        found = {}
        for pid in list(self._seen):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if self._lives(pid):
                    found[pid] = command.strip()
        return found

    def of(self, name: str) -> list[int]:
        """The living whose command line has this in it, the oldest first."""
        found = [pid for pid, command in self.living().items() if name in command]
        return sorted(found, key=lambda pid: int(self._seen[pid]))

    def left(self) -> list[str]:
        """What is left of all members: processes, shared memory, folders."""
        running = [f"{pid} {command}" for pid, command in self.living().items()]
        return running + [path for pid in list(self._seen) for path in left_of(pid)]

    def close(self) -> None:
        """Stop looking."""
        self._over.set()
        self._looking.join()


def _start_of(pid: int) -> str:
    """When it started, in ticks; empty if it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


class RunningFleet:
    """A fleet that is up."""

    def __init__(self, url: str, family: Family, folder: Path) -> None:
        self.url, self.family, self.folder = url, family, folder

    def ready(self) -> set[str]:
        """The replicas that answer an operator."""
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        try:
            answer = httpx.get(f"{self.url}/admin/v1/fleet", headers=headers, timeout=30)
        except httpx.HTTPError:
            return set()
        found = answer.json()["replicas"] if answer.status_code == 200 else []
        return {str(one["replica"]) for one in found if one["status"] == 200}

    def logs(self) -> str:
        """The ends of everything that was logged."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("assets/**/*.log")]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-6000:]}" for file in files)


@contextmanager
def running_fleet(
    folder: Path, command: Sequence[object], port: int, replicas: int, within: float
) -> Iterator[RunningFleet]:
    """Run a command that serves a fleet here, and wait until all replicas are ready; end it with SIGTERM.

    Afterwards nothing may be left of it.
    """
    mark, before, log = uuid.uuid4().hex, abandoned(), folder / "deploy.log"
    variables = {"TEST_MARK": mark, "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=output,
            stderr=output,
            env={**environment(folder), "HF_ASSETS_CACHE": str(folder / "assets"), **variables},
        )
    fleet = RunningFleet(f"http://127.0.0.1:{port}", Family(mark, process.pid), folder)
    try:
        up = until(lambda: f"{replicas} replicas serve on" in log.read_text() or process.poll() is not None, within)
        assert up, f"no fleet within {within} s"
        assert process.poll() is None, "the fleet did not start"
        yield fleet
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
        assert until(lambda: not fleet.family.left(), 30), fleet.family.left()
        assert until(lambda: abandoned() <= before, 60), abandoned() - before
    except BaseException:
        print(fleet.logs())  # pytest shows it beside what failed
        raise
    finally:
        fleet.family.close()
        process.kill()
        process.wait()
        for pid in fleet.family.living():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def real_fleet(
    folder: Path, options: Sequence[object], replicas: int, within: float
) -> AbstractContextManager[RunningFleet]:
    """`peanut-serve deploy --local` with these options."""
    (folder / "admin-key").write_text(ADMIN_KEY)
    port = free_port()
    own = ["--local", "--replicas", replicas, "--port", port, "--admin-key-file", folder / "admin-key"]
    return running_fleet(folder, [*_DEPLOY, *own, "--state", folder / "state", *options], port, replicas, within)


def fake_fleet(folder: Path, replicas: int, within: float) -> AbstractContextManager[RunningFleet]:
    """The same with fake engines, whose swaps take a moment."""
    (folder / "admin-key").write_text(ADMIN_KEY)
    port = free_port()
    engine = {
        "command": [sys.executable, fake_server.__file__],
        "options": ["--swap", "0.1", "--journal", str(folder / "journal")],
    }
    settings = FleetSettings.model_validate(
        {"engine": engine, "replicas": replicas, "cpus": 0.1, "logs": folder, "admin_key_file": folder / "admin-key"}
    )
    return running_fleet(
        folder, [sys.executable, "-c", _SERVE, settings.model_dump_json(), port], port, replicas, within
    )


async def kill_one(fleet: RunningFleet, name: str, generator: random.Random) -> None:
    """SIGKILL a process that has the name in its command line; clients go on meanwhile."""

    def kill() -> None:
        assert until(lambda: bool(fleet.family.of(name)), 300), f"no {name}: {fleet.family.living()}"
        os.kill(generator.choice(fleet.family.of(name)), signal.SIGKILL)

    await asyncio.to_thread(kill)
