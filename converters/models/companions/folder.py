"""One side of the choice: a folder, and the companions in it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.files.json_files import parse_json
from converters.models.companions.names import SETS, set_of

_MODULES = "modules.json"
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Folder:
    """The base's folder, or the adapter's.

    Attributes:
        side: `base` or `adapter`.
        path: where it is; None for an adapter that is a single file, since the files next to it may be unrelated.
    """

    side: str
    path: Path | None

    @cached_property
    def sets(self) -> Mapping[str, Mapping[str, Path]]:
        """Set -> its files, relative name -> path."""
        found: dict[str, dict[str, Path]] = {kind: {} for kind in SETS}
        for name, path in self._candidates():
            if (kind := set_of(name)) is not None:
                found[kind][name] = path
        return found

    @cached_property
    def entries(self) -> tuple[str, ...]:
        """Everything in the folder by name, a folder in it with a slash at the end."""
        if self.path is None:
            return ()
        return tuple(sorted(f"{path.name}/" if path.is_dir() else path.name for path in self.path.iterdir()))

    def read(self, name: str) -> dict[str, Any]:
        """The content of a JSON object; empty if it is not there or is not JSON, since that says nothing."""
        try:
            value = parse_json(self.path / name) if self.path is not None else {}
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    @cached_property
    def modules(self) -> tuple[tuple[str, str], ...] | None:
        """(type, folder) of each module that sentence-transformers runs; None if there are none."""
        try:
            listed = parse_json(self.path / _MODULES) if self.path is not None else None
        except (OSError, ValueError):
            return None
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            return None
        return tuple((str(one.get("type", "")), str(one.get("path", ""))) for one in listed)

    def files_in(self, name: str) -> dict[str, Path]:
        """All files in one of its folders, relative name -> path. A name that leads elsewhere has none."""
        if self.path is None or name in (".", "..") or Path(name).name != name:
            return {}
        return {
            path.relative_to(self.path).as_posix(): path
            for path in sorted((self.path / name).rglob("*"))
            if path.is_file()
        }

    def _candidates(self) -> Iterator[tuple[str, Path]]:
        if self.path is None:
            return
        for name in self.entries:
            if (self.path / name).is_file():
                yield name, self.path / name
        yield from self.files_in(_TEMPLATES).items()


def as_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object in the style of transformers' configs."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
