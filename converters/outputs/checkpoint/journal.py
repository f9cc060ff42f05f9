"""What a run has finished, a file for each shard, so that another run can continue a run that was killed.

The entries are hints: a tensor is hashed again before it is taken over. So the files need no sync.
"""

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from converters.files.staging import empty

_FOLDER = ".journal"  # in the staging folder; removed before that is published
_SAMPLES = "base.jsonl"


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor that is written.

    Attributes:
        digest: xxh3_128 of its bytes.
        recomputed: how many numbers were recomputed in float64; None if it was not verified.
        max_ulp: their largest error, in ulp.
    """

    digest: str
    recomputed: int | None = None
    max_ulp: float = 0.0


class Journal:
    """The journal of one output.

    Args:
        staging: the folder the output is written in.
        key: identity of the merge. A journal of another merge is removed, and with it what that merge had written.
    """

    def __init__(self, staging: Path, key: str) -> None:
        self._folder = staging / _FOLDER
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self.finished: dict[str, WrittenTensor] = {}
        self.samples: dict[str, str] = {}  # tensor of a streamed base -> its digest
        if (self._folder / "key").is_file() and (self._folder / "key").read_text() == key:
            for path in self._folder.glob("*.safetensors.jsonl"):
                self.finished |= {name: WrittenTensor(*rest) for name, *rest in _read(path) if len(rest) == 3}
            self.samples = dict(_read(self._folder / _SAMPLES))
            return
        empty(staging)
        self._folder.mkdir()
        (self._folder / "key").write_text(key)

    def record(self, shard: str, name: str, written: WrittenTensor) -> None:
        """Record that a tensor is written, and checked. Thread-safe."""
        self._append(f"{shard}.jsonl", [name, *astuple(written)])

    def record_samples(self, samples: Mapping[str, str]) -> None:
        """Record the digests of a shard of the base that will not stay on the disk."""
        for name, digest in samples.items():
            self._append(_SAMPLES, [name, digest])

    def _append(self, file: str, entry: list[Any]) -> None:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(self._folder / file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.write(self._files[file], (json.dumps(entry) + "\n").encode())

    def close(self) -> None:
        """Close its files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def remove(self) -> None:
        """Remove the journal: everything is finished."""
        self.close()
        shutil.rmtree(self._folder)


def _read(path: Path) -> Iterator[list[Any]]:
    """The entries of one file, if it is there; an incomplete last line is ignored."""
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            yield json.loads(line)
