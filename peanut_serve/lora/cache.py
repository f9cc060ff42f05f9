"""A disk cache of evaluated LoRA adapters: named by content, bounded, shared between processes.

Every entry is a folder that is created atomically, by a rename. Its users hold a shared lock on it. Only unlocked
entries are removed, the least recently used first, so the limit can be exceeded while many are in use.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from converters.errors import CheckpointError, OutputBusyError, OutputExistsError
from converters.serving import MANIFEST_NAME, PEFT_WEIGHTS, hash_file, read_json

_POLL_SECONDS = 0.05


class Lease:
    """Keeps an entry on disk until it is released, or the process exits.

    Attributes:
        folder: the LoRA adapter.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Allow the entry to be removed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class LoraCache:
    """A folder of LoRA adapters.

    Args:
        folder: of the cache; created if it does not exist.
        max_bytes: size limit; it can be exceeded only by entries in use.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._verified: dict[str, tuple[int, ...]] = {}  # key -> state of the files when the hash was right
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, key: str) -> Lease | None:
        """The entry of a key, if there is one that is complete and unchanged."""
        folder = self.folder / key
        lease = _lease(folder)
        if lease is None:
            return None
        if not self._is_whole(key):
            lease.release()
            return None
        os.utime(folder)  # the time of its last use
        return lease

    def get(self, key: str, write: Callable[[Path], object]) -> Lease:
        """The entry of a key. If it is missing or damaged, `write` creates it, in one process at a time.

        Args:
            key: hexadecimal digest of everything the entry depends on.
            write: writes the LoRA adapter to a folder, atomically.

        Raises `CheckpointError` if the entry is damaged while another process uses it, and what `write` raises.
        """
        folder = self.folder / key
        while True:
            if (lease := self.find(key)) is not None:
                return lease
            if folder.exists() and not self._remove(folder):
                if (lease := self.find(key)) is not None:
                    return lease
                raise CheckpointError(f"{folder} is damaged and in use; stop its users, then remove it")
            try:
                write(folder)
            except OutputBusyError:
                time.sleep(_POLL_SECONDS)  # another process is writing it
            except OutputExistsError:
                continue  # another process has written it
            else:
                self.shrink(keep=folder)

    def shrink(self, keep: Path | None = None) -> None:
        """Remove the least recently used entries until the rest fits; those in use and `keep` are not removed."""
        entries = sorted((path for path in self._entries() if path != keep), key=_last_use)
        total = sum(map(_size, [*entries, *([keep] if keep else [])]))
        for entry in entries:
            if total <= self.max_bytes:
                return
            size = _size(entry)
            if self._remove(entry):
                total -= size

    def _is_whole(self, key: str) -> bool:
        """Whether an entry is complete and unchanged; its hash is computed when its files have changed."""
        folder = self.folder / key
        try:
            stats = [(folder / name).stat() for name in (PEFT_WEIGHTS[0], MANIFEST_NAME)]
            state = tuple(n for s in stats for n in (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
            if self._verified.get(key) == state:
                return True
            expected = read_json(folder / MANIFEST_NAME, "manifest")["weights"]["xxh3_128"]
            is_whole = bool(expected == hash_file(folder / PEFT_WEIGHTS[0]))
        except (CheckpointError, OSError, KeyError):
            return False
        if is_whole:
            self._verified[key] = state
        return is_whole

    def _entries(self) -> Iterator[Path]:
        for path in self.folder.iterdir():
            if path.name.startswith(".trash-"):
                shutil.rmtree(path, ignore_errors=True)  # left by a process that was killed while removing it
            elif not path.name.startswith("."):
                yield path

    def _remove(self, entry: Path) -> bool:
        """Remove an entry unless it is in use."""
        lock = _lock(entry, fcntl.LOCK_EX)
        if lock is None:
            return False
        trash = entry.with_name(f".trash-{entry.name}-{os.getpid()}")
        with suppress(OSError):
            entry.rename(trash)
            self._verified.pop(entry.name, None)
            shutil.rmtree(trash, ignore_errors=True)
        os.close(lock)
        return True


def _lease(folder: Path) -> Lease | None:
    descriptor = _lock(folder, fcntl.LOCK_SH)
    return None if descriptor is None else Lease(folder, descriptor)


def _lock(folder: Path, kind: int) -> int | None:
    """Lock a folder, unless it does not exist, was replaced while locking it, or has a conflicting lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _last_use(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(entry: Path) -> int:
    with suppress(FileNotFoundError):
        return sum(path.stat().st_blocks * 512 for path in entry.iterdir())
    return 0
