"""Running the project's commands."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from support.paths import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands from the environment of the tests."""
    program = Path(sys.executable).parent / str(command[0])
    return subprocess.run(
        [program, *map(str, command[1:])],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )


def built(base: Path, script: str) -> Path:
    """A real pretrained model, built from a PyPI package (`make test` has done it)."""
    if not (base / "config.json").exists():
        subprocess.run([sys.executable, ROOT / "examples" / script, base], check=True)
    return base
