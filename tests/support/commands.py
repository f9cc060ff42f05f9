"""Running the project's commands."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Timer

from support.paths import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]
SECONDS = 600  # that a command may take
PRELOADED = Path(__file__).with_name("preloaded.py")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands from the environment of the tests, in a process of its own."""
    program = Path(sys.executable).parent / str(command[0])
    arguments = [str(program), *map(str, command[1:])]
    variables = {**os.environ, **environment}
    if "PYTHONPATH" not in environment:
        return _forking().run(arguments, variables)
    return subprocess.run(arguments, capture_output=True, text=True, env=variables, timeout=SECONDS)


class _Forking:
    """Our end of `preloaded`."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process = subprocess.Popen(
            [sys.executable, PRELOADED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        with TemporaryDirectory() as folder, self._lock:
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            for file in files:
                file.touch()
            request = {"command": command, "environment": environment, "folder": str(Path.cwd())}
            print(json.dumps({**request, "output": list(map(str, files))}), file=self._process.stdin, flush=True)
            timer = Timer(SECONDS, os.kill, (self._read(), signal.SIGKILL))
            timer.start()
            try:
                code = self._read()
            finally:
                timer.cancel()
            return subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))

    def _read(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


_forking = cache(_Forking)


def built(base: Path, script: str) -> Path:
    """A real pretrained model, built from a PyPI package (`make test` has done it)."""
    if not (base / "config.json").exists():
        subprocess.run([sys.executable, ROOT / "examples" / script, base], check=True, timeout=1800)
    return base
