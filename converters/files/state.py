"""Whether a file is still the one that was opened."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileState:
    """What changes when a file is replaced or written to."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path) -> "FileState | None":
        """The state now; None if the file is gone."""
        try:
            found = os.stat(file)  # noqa: PTH116
        except OSError:
            return None
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)
