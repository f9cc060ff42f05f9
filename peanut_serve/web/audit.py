"""Who changed what on the admin side: JSON lines in a file that is rotated. A key is never written, see `Caller`."""

import fcntl
import json
import logging
import logging.handlers
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from converters.errors import OptionError, PeanutError
from peanut_serve.settings.server import ServerSettings
from peanut_serve.web.schema import Control, EngineStatus, SwapStatus, VariantStatus, VariantTraffic

logger = logging.getLogger("vllm.peanut_serve")

FILE = "audit.jsonl"  # in the state folder
_MOST_BYTES = 10 << 20  # of a file
_KEPT = 10  # full files, FILE.1 being the latest


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Attributes:
        address: of the client; None if it is unknown.
        key: name of the operator, see `Operator`, in the console with the number of the session.
    """

    address: str | None = None
    key: str | None = None


_NOBODY = Caller()
caller: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)  # of the request that is being answered


class AuditLog:
    """A file that gets a line for each change. One process writes it: others would rotate its lines away.

    Args:
        file: created if it does not exist; only its owner may read it.
        most_bytes: size from which a new file is begun.
        kept: number of full files that are kept.

    Raises `OptionError` if it cannot be written, or another process writes it.
    """

    def __init__(self, file: Path, most_bytes: int = _MOST_BYTES, kept: int = _KEPT) -> None:
        self.file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._handler = _Handler(file, maxBytes=most_bytes, backupCount=kept, encoding="utf-8")
        except BlockingIOError:
            raise OptionError(
                f"another server writes the audit log {file}; give each server a file of its own as --audit-log"
            ) from None
        except OSError as error:
            raise OptionError(f"the audit log {file} cannot be written: {error.strerror}") from None

    def write(self, by: Caller, action: str, variant: str, facts: Mapping[str, Any]) -> None:
        """Write a line. If that fails, the server's log gets it, with the reason: what was done cannot be undone.

        Args:
            by: who did it.
            action: the verb, as in `peanut-serve ctl`.
            variant: its name.
            facts: what was given, the outcome, digests.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        entry = {"time": now, "from": by.address, "key": by.key, "action": action, "variant": variant, **facts}
        self._handler.handle(logging.makeLogRecord({"msg": json.dumps(entry)}))

    @contextmanager
    def noting(
        self, action: str, variant: str, digest: Callable[[], str | None], facts: Callable[[], Mapping[str, Any]]
    ) -> Iterator[None]:
        """Write a line about what happens within: by whom, its outcome, and the digests before and after.

        Args:
            action, variant: see `write`.
            digest: what `old` and `new` are.
            facts: what else belongs into the line; called at the end.
        """
        old, began = digest(), time.monotonic()
        result: dict[str, Any] = {"outcome": "done"}
        try:
            yield
        except BaseException as error:
            kind = "refused" if isinstance(error, PeanutError) else "failed"
            result = {"outcome": kind, "error": f"{type(error).__name__}: {error}"}
            raise
        finally:
            known = {**facts(), **result, "old": old, "new": digest(), "seconds": round(time.monotonic() - began, 3)}
            self.write(caller.get(), action, variant, known)

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


def audit_log(settings: ServerSettings) -> AuditLog:
    """The audit log of a server. Raises `OptionError` if it cannot be written, or another server writes it."""
    return AuditLog(settings.audit_log or settings.state / FILE)


class _Handler(logging.handlers.RotatingFileHandler):
    def _open(self) -> TextIOWrapper:
        """Open the file, and lock it until it is closed. Raises `BlockingIOError` if another process has it."""
        opened = open(self.baseFilename, self.mode, encoding=self.encoding, opener=_privately)  # noqa: SIM115
        try:
            if stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            opened.close()
            raise
        except OSError:  # of a file system without locks
            pass
        return opened  # type: ignore[return-value]

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Called by `emit` in an `except` block."""
        logger.exception("the audit log %s cannot be written; the entry is: %s", self.baseFilename, record.msg)


def _privately(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class AuditedControl:
    """Writes the changes of a `Control` to an audit log.

    `old` and `new` are digests: of the version that the name refers to, and for `activate` of the engine's weights.
    """

    def __init__(self, control: Control, log: AuditLog) -> None:
        self._control, self._log = control, log

    async def variants(self) -> list[VariantStatus]:
        """See `Control`."""
        return await self._control.variants()

    def variant(self, name: str) -> VariantStatus:
        """See `Control`."""
        return self._control.variant(name)

    def engine(self) -> EngineStatus:
        """See `Control`."""
        return self._control.engine()

    def swaps(self) -> list[SwapStatus]:
        """See `Control`."""
        return self._control.swaps()

    async def traffic(self) -> list[VariantTraffic]:
        """See `Control`."""
        return await self._control.traffic()

    async def register(self, name: str, source: str) -> VariantStatus:
        """See `Control`."""
        with self._noting("register", name, source=source):
            return await self._control.register(name, source)

    async def unregister(self, name: str, drain: bool) -> None:
        """See `Control`."""
        with self._noting("unregister", name, drain=drain):
            await self._control.unregister(name, drain)

    async def activate(self, name: str) -> VariantStatus:
        """See `Control`."""
        with self._noting("activate", name):
            return await self._control.activate(name)

    async def reload(self, name: str) -> VariantStatus:
        """See `Control`."""
        with self._noting("reload", name):
            return await self._control.reload(name)

    async def rollback(self, name: str, digest: str | None, hold: bool) -> VariantStatus:
        """See `Control`."""
        with self._noting("rollback", name, digest=digest, hold=hold):
            return await self._control.rollback(name, digest, hold)

    async def preload(self, name: str) -> VariantStatus:
        """See `Control`."""
        with self._noting("preload", name):
            return await self._control.preload(name)

    async def pin(self, name: str, pinned: bool) -> VariantStatus:
        """See `Control`."""
        with self._noting("pin" if pinned else "unpin", name):
            return await self._control.pin(name, pinned)

    def _noting(self, action: str, name: str, **given: Any) -> AbstractContextManager[None]:
        return self._log.noting(action, name, lambda: self._digest(action, name), lambda: given)

    def _digest(self, action: str, name: str) -> str | None:
        if action == "activate":
            return self._control.engine().digest
        try:
            return self._control.variant(name).digest
        except PeanutError:
            return None
