"""Looks up adapters by name. A name from a request is checked against a pattern and a list; it is never a path."""

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters import load_adapter
from converters.errors import LayoutError, OptionError, PeanutError
from converters.serving import INDEX_FILE, MODEL_CONFIG, SINGLE_FILE, is_hub_id

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FILES = (".safetensors", ".bin", ".pt", ".pth")

_UNFINISHED = 30  # times the usual rest
_TAIL = 512  # bytes

# (name, inode, size, mtime, ctime) of every file of an adapter
State = tuple[tuple[str | int, ...], ...]


@dataclass(frozen=True)
class VariantSource:
    """An adapter that may be served.

    Attributes:
        name: the name in requests.
        spec: folder, weights file or Hub id.
    """

    name: str
    spec: Path | str

    def state(self) -> State:
        """A value that changes when the files are replaced; empty if they are missing, constant for a Hub id."""
        if isinstance(self.spec, str):
            return ((self.spec,),)
        try:
            files = sorted(self.spec.iterdir()) if self.spec.is_dir() else [self.spec]
            stats = [(file.name, file.stat()) for file in files]
        except OSError:
            return ()
        return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)

    def unsettled_seconds(self, settle: float) -> float:
        """Seconds until the files have not changed for long enough to be taken for complete.

        A weights file that ends in zeros may have been given its size before its contents, as some downloads do: it
        has to rest for `_UNFINISHED` times as long.

        Args:
            settle: seconds without a change after which other files are complete.
        """
        state = self.state()
        if isinstance(self.spec, str) or not state:
            return 0.0
        is_suspect = any(
            _ends_in_zeros(self.spec / str(name) if self.spec.is_dir() else self.spec) for name, *_ in state
        )
        needed = settle * (_UNFINISHED if is_suspect else 1)
        age = time.time() - max(max(int(m), int(c)) for *_, m, c in state) / 1e9
        return min(needed, max(0.0, needed - age))


class AdapterRoots:
    """Folders whose entries are adapters, and allowed Hub ids.

    Args:
        roots: each a folder, or a Hub id `user/name`.

    Raises `OptionError` for a root that is neither.
    """

    def __init__(self, roots: Iterable[str | Path]) -> None:
        self.folders: list[Path] = []
        self.hub_ids: list[str] = []
        for root in roots:
            if Path(root).expanduser().is_dir():
                # links are followed at every look: a link to the current release is moved by a deployment
                self.folders.append(Path(root).expanduser().absolute())
            elif "/" in str(root) and is_hub_id(str(root)):
                self.hub_ids.append(str(root))
            else:
                raise OptionError(f"{root} is neither a folder of adapters nor a Hub id like user/name")

    def find(self, name: str) -> VariantSource | None:
        """The adapter with this name, if there is one.

        Raises `OptionError` if it is in two folders.
        """
        if name in self.hub_ids:
            return VariantSource(name, name)
        if not _NAME.fullmatch(name):
            return None
        found = [path for folder in self.folders for path in _candidates(folder, name)]
        if len(found) > 1:
            raise OptionError(f"there are two adapters {name}: {found[0]} and {found[1]}; rename one of them")
        return VariantSource(name, found[0]) if found else None

    @staticmethod
    def is_name(name: str) -> bool:
        """Whether this is a valid name for a variant."""
        return bool(_NAME.fullmatch(name)) or ("/" in name and is_hub_id(name))

    def names(self) -> list[str]:
        """Every name that a request can use."""
        entries = {
            entry.stem if entry.suffix in _FILES else entry.name
            for folder in self.folders
            for entry in _entries(folder)
        }
        return sorted(filter(self.exists, entries)) + self.hub_ids

    def exists(self, name: str) -> bool:
        """Whether an adapter has this name, even if two have it."""
        if not _NAME.fullmatch(name):
            return name in self.hub_ids
        return any(path for folder in self.folders for path in _candidates(folder, name))


def _candidates(folder: Path, name: str) -> Sequence[Path]:
    """The folder with weights, or the weights files, that have this name."""
    inside = folder / name
    if inside.is_dir():
        return [inside] if any(path.suffix in _FILES for path in _entries(inside)) else []
    return [path for path in (inside.with_name(name + ending) for ending in _FILES) if path.is_file()]


def _entries(folder: Path) -> list[Path]:
    """The contents of a folder; empty if it is gone or cannot be read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _ends_in_zeros(file: Path) -> bool:
    """Whether the last bytes of a weights file are all zero."""
    if file.suffix not in _FILES:
        return False
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - _TAIL))
            return not any(opened.read())
    except OSError:
        return True


def looks_merged(source: Path) -> bool:
    """Whether a folder contains a merged model rather than an adapter."""
    has_weights = (source / SINGLE_FILE).is_file() or (source / INDEX_FILE).is_file()
    if not has_weights or not (source / MODEL_CONFIG).is_file():
        return False
    try:
        load_adapter(source)
    except LayoutError:
        return True
    except PeanutError:
        pass  # a damaged adapter
    return False
