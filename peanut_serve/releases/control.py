"""Releases as operators see and change them. Each change, and each end by failures, is in the audit log."""

from contextlib import AbstractContextManager
from datetime import datetime, timezone
from typing import Any

from converters.errors import PeanutError
from peanut_serve.releases.checking import Route
from peanut_serve.releases.releasing import Releases
from peanut_serve.releases.schema import CanaryStatus, EventStatus, ReleaseStatus, Weighing
from peanut_serve.swapping.server import VariantServer
from peanut_serve.variants.release import Release
from peanut_serve.web.audit import AuditLog, Caller

_SERVER = Caller(None, "peanut-serve")  # what it does by itself


class AuditedReleases:
    """Implements `schema.ReleaseControl`.

    Args:
        server: whose releases they are.
        route: see `Releases`.
        log: the audit log.
    """

    def __init__(self, server: VariantServer, route: Route, log: AuditLog) -> None:
        self._server, self._log = server, log
        self._releases = Releases(server, route, self._note_end)

    def releases(self) -> list[ReleaseStatus]:
        """See `ReleaseControl`."""
        return [self.release(name) for name in self._releases.book.names()]

    def release(self, name: str) -> ReleaseStatus:
        """See `ReleaseControl`."""
        found = self._releases.book.find(name)
        watched, failed = self._releases.book.counts(name)
        events = [
            EventStatus(**{**one.model_dump(), "at": datetime.fromtimestamp(one.at, timezone.utc)})
            for one in found.events
        ]
        return ReleaseStatus(
            name=name,
            state=found.state,
            digest=found.digest,
            source=found.source,
            replaces=found.replaces,
            weight=found.weight,
            max_error_rate=found.max_error_rate,
            min_requests=found.min_requests,
            watched=watched,
            failed=failed,
            passed=found.passed,
            canary=[CanaryStatus(**one.model_dump()) for one in found.answers or ()],
            events=events,
        )

    async def hold(self, name: str) -> None:
        """See `ReleaseControl`."""
        with self._noting("hold", name):
            await self._releases.hold(name)

    async def stage(self, name: str, source: str | None, digest: str | None = None) -> ReleaseStatus:
        """See `ReleaseControl`."""
        expected = {"expected": digest} if digest else {}
        with self._noting("stage", name, source=source, **expected):
            await self._releases.stage(name, source, digest)
        return self.release(name)

    async def check(self, name: str) -> ReleaseStatus:
        """See `ReleaseControl`."""
        with self._noting("check", name):
            await self._releases.check(name)
        return self.release(name)

    async def weigh(self, name: str, weighing: Weighing) -> ReleaseStatus:
        """See `ReleaseControl`."""
        given = weighing.model_dump()
        with self._noting("weight", name, **given):
            self._releases.weigh(
                name, weighing.weight, weighing.max_error_rate, weighing.min_requests, weighing.force
            )
        return self.release(name)

    async def promote(self, name: str, force: bool) -> ReleaseStatus:
        """See `ReleaseControl`."""
        with self._noting("promote", name, force=force):
            await self._releases.promote(name, force)
        return self.release(name)

    async def rollback(self, name: str, reason: str | None) -> ReleaseStatus:
        """See `ReleaseControl`."""
        with self._noting("rollback", name, reason=reason):
            await self._releases.rollback(name, reason)
        return self.release(name)

    def _note_end(self, name: str, release: Release, reason: str) -> None:
        facts = {"reason": reason, "outcome": "done", "staged": release.digest}
        digest = self._digest(name)
        self._log.write(_SERVER, "release rollback", name, {**facts, "old": digest, "new": digest})

    def _noting(self, action: str, name: str, **given: Any) -> AbstractContextManager[None]:
        """Write a line: `old` and `new` are the versions of the name, `staged` is the one beside them."""
        before = self._staged(name)
        return self._log.noting(
            f"release {action}",
            name,
            lambda: self._digest(name),
            lambda: {**given, "staged": self._staged(name) or before},
        )

    def _digest(self, name: str) -> str | None:
        try:
            return self._server.facts(name).digest
        except PeanutError:
            return None

    def _staged(self, name: str) -> str | None:
        try:
            release = self._releases.book.find(name)
        except PeanutError:
            return None
        return release.digest if release.is_open else None
