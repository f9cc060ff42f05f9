"""Detecting whether a file changed after it was opened."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileState:
    """Attributes that change when a file is replaced or written to."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path) -> "FileState | None":
        """The current state, or None if the file does not exist."""
        try:
            found = os.stat(file)  # noqa: PTH116
        except OSError:
            return None
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)
