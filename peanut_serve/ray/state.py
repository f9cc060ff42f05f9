"""Folders for the state of engines: two on one machine cannot share one, and a later engine goes on with it."""

import fcntl
import os
from itertools import count
from pathlib import Path
from typing import Self

_REPLICA, _ENGINE = "replica-lock", "lock"  # the latter is the engine's own (peanut_serve.variants.state_folder)


class StateFolder:
    """A folder that one replica of this machine has, until it closes it or ends."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path, self._lock = path, lock

    @classmethod
    def take(cls, parent: Path) -> Self:
        """The first of `parent`'s folders 0, 1, ... that is free, so that a restarted fleet uses the same ones.

        One is also not free while the engine of a replica that was killed has not ended.
        """
        for number in count():
            path = parent / str(number)
            path.mkdir(parents=True, exist_ok=True)
            lock = _locked(path / _REPLICA)
            if lock is None:
                continue
            engine = _locked(path / _ENGINE)
            if engine is not None:
                os.close(engine)
                return cls(path, lock)
            os.close(lock)
        raise AssertionError("numbers do not end")

    def close(self) -> None:
        """Let another replica have it."""
        os.close(self._lock)


def _locked(file: Path) -> int | None:
    """A descriptor that holds the file's lock, or None if another one does."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
