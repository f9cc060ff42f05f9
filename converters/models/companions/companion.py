"""What is chosen: the companions of an output, written into its folder and recorded in its manifest."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from converters.errors import AdapterError, CheckpointError
from converters.files.hashing import hash_file

_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Companion:
    """One file of an output.

    Attributes:
        side: `base` or `adapter`.
        source: the file it comes from.
        content: what is written, if that is not a copy.
        change: what was changed, if it is not a copy.
    """

    side: str
    source: Path
    content: bytes | None = None
    change: str | None = None

    def edited(self, content: bytes, change: str) -> "Companion":
        """The same with other content."""
        return replace(self, content=content, change=change if self.change is None else f"{self.change}; {change}")

    def read(self) -> bytes:
        """What is written."""
        return self.source.read_bytes() if self.content is None else self.content

    @property
    def digest(self) -> str:
        """xxh3_128 of what is written."""
        return hash_file(self.source) if self.content is None else xxhash.xxh3_128(self.content).hexdigest()

    def write(self, path: Path) -> None:
        """Write it to `path`."""
        path.parent.mkdir(exist_ok=True, parents=True)
        if self.content is None:
            shutil.copyfile(self.source, path)
        else:
            path.write_bytes(self.content)


@dataclass(frozen=True)
class LeftOut:
    """A file that is not in the output, and why."""

    side: str
    name: str
    why: str


@dataclass(frozen=True)
class Companions:
    """The companions of an output.

    Attributes:
        files: relative name -> what is written there.
        left_out: the files of both sides that have no counterpart in the output.
        notes: what the user should know.
    """

    files: Mapping[str, Companion] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write all of them into `folder`."""
        for name, companion in self.files.items():
            companion.write(folder / name)

    def facts(self) -> dict[str, Any]:
        """The part of a manifest about them."""
        return {
            "files": {
                name: {
                    "from": one.side,
                    "xxh3_128": one.digest,
                    **({"changed": one.change} if one.change is not None else {}),
                }
                for name, one in sorted(self.files.items())
            },
            "left_out": {one.name: {"from": one.side, "why": one.why} for one in self.left_out},
        }


def refuse_unreadable(files: Mapping[str, Companion]) -> None:
    """Refuse files that may not be read, or that a clone without Git LFS left as pointers.

    Raises `CheckpointError` or `AdapterError`.
    """
    for one in files.values():
        error = CheckpointError if one.side == "base" else AdapterError
        try:
            with one.source.open("rb") as file:
                pointer = file.read(len(_POINTER)) == _POINTER
        except OSError as cause:
            raise error(f"{one.source}: cannot be read ({cause.strerror}); check its rights") from None
        if pointer:
            raise error(f"{one.source} is a Git LFS pointer, expected the file itself; fetch it with 'git lfs pull'")
