"""The keys of a file that may change while the server runs."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from prometheus_client import Gauge

from converters.errors import OptionError
from peanut_serve.settings.admin_key import KEY_VARIABLE
from peanut_serve.settings.server import ServerSettings
from peanut_serve.tenants.keys import Key, Role, digest_of, read_keys_file

logger = logging.getLogger("vllm.peanut_serve")

KEYS_CURRENT = Gauge("peanut_keys_current", "1 while the keys are those of the keys file; 0 if it cannot be read.")
KEYS_CURRENT.set(1)

_LOOK_SECONDS = 1.0
_PATIENCE = 0.05  # seconds that a request waits for the new keys: a large file takes longer to be parsed
_OPEN_BITS = 0o026  # written by the group or others, read by others

_Signature = tuple[int, int, int] | None


class WatchedKeys:
    """The keys of a file, which is looked at again at most once a second, in a thread.

    A new file that cannot be used changes nothing: the keys stay as they were, the log says why, and
    `peanut_keys_current` is 0.

    Args:
        file: see `read_keys_file`.
        clock: seconds that only grow.

    Raises `OptionError` if the file cannot be used now.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        self._looked = clock()
        self._thread = ThreadPoolExecutor(1, "keys")
        self._looking: Future[None] | None = None
        self._signature = _signature(file)  # before the content: what changes in between is read once more
        self._keys: Mapping[bytes, Key] = read_keys_file(file)
        KEYS_CURRENT.set(1)
        _warn_if_open(file)

    @property
    def keys(self) -> Mapping[bytes, Key]:
        """The current keys by their digests; another object if they have changed."""
        now = self._clock()
        if now - self._looked >= _LOOK_SECONDS and (self._looking is None or self._looking.done()):
            self._looked = now
            self._looking = self._thread.submit(self._look)
            wait([self._looking], _PATIENCE)
        return self._keys

    def find(self, token: bytes) -> Key | None:
        """The entry of a key."""
        return self.keys.get(digest_of(token))

    @property
    def has_operators(self) -> bool:
        """Whether somebody may use the admin API by a key of the file."""
        return any(key.role is not Role.DATA for key in self.keys.values())

    def _look(self) -> None:
        signature = _signature(self._file)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            new = read_keys_file(self._file)
        except OptionError as error:
            KEYS_CURRENT.set(0)
            logger.error("the keys stay as they were: %s", error)
            return
        before, after = ({key.name for key in keys.values()} for keys in (self._keys, new))
        self._keys = new
        KEYS_CURRENT.set(1)
        logger.info(
            "the keys file was read again: %d names, new: %s, gone: %s",
            len(after), ", ".join(sorted(after - before)) or "none", ", ".join(sorted(before - after)) or "none",
        )  # fmt: skip
        _warn_if_open(self._file)


def keys_of(settings: ServerSettings) -> WatchedKeys | None:
    """The keys of a server's keys file; None if it has none.

    Raises `OptionError` if the file cannot be used, or if nobody could use the admin API that is asked for.
    """
    if settings.keys is None:
        return None
    watched = WatchedKeys(settings.keys)
    if settings.admin_port is not None and not os.environ.get(KEY_VARIABLE) and not watched.has_operators:
        raise OptionError(
            f"--admin-port needs a key: set {KEY_VARIABLE}, or give a key in {settings.keys} the role admin"
        )
    return watched


def _signature(file: Path) -> _Signature:
    """What tells that a file is another than before; None if there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _warn_if_open(file: Path) -> None:
    try:
        mode = file.stat().st_mode
    except OSError:
        return
    if mode & _OPEN_BITS:
        logger.warning("others may read or change the keys file %s (mode %o); use chmod 600", file, mode & 0o777)
