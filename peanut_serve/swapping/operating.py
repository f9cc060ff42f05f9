"""What operators do to the variants of a server: activate, register, reload, roll back, pin, remove."""

import asyncio
import time
from contextlib import ExitStack

from peanut_serve.errors import EngineDownError, UnknownVariantError, VariantInUseError
from peanut_serve.swapping import metrics
from peanut_serve.swapping.gate import ABORT_SECONDS, Ticket
from peanut_serve.swapping.observing import ObservedServer
from peanut_serve.tenants.usage import USAGE
from peanut_serve.variants.catalogue import Variant
from peanut_serve.variants.version import Version

_POLL_SECONDS = 0.05


class OperatedServer(ObservedServer):
    """The part of a `VariantServer` that changes its variants.

    Attributes:
        in_flight: waiting and running requests; by the variant, as a name may come back while requests for the old
            one end.
    """

    in_flight: dict[Variant, set[Ticket]]

    def has(self, name: str) -> bool:
        """Whether a request can use a name."""
        return self.catalogue.has(name)

    async def prepare(self, name: str) -> Version:
        """The current version of a variant, ready to be swapped to. Raises `UnknownVariantError`, `VariantError`."""
        with ExitStack() as holds:
            return await self._preparation.current(name, holds)

    async def activate(self, name: str) -> None:
        """Swap to a variant next. Raises the same errors as `serving`, except `QueueFullError`."""
        self._check_engine()
        with ExitStack() as holds:
            digest = self._weights_of(await self._preparation.current(name, holds))
            self.driver.clear_failure(digest)
            ticket = Ticket(digest, time.monotonic(), lambda: None, name)
            self.driver.request_swap(digest)
            try:
                await self.gate.enter(ticket)
            finally:
                self.driver.withdraw_swap(digest)
            self.gate.leave(ticket)

    def remember_active(self, name: str) -> None:
        """Record that this variant is to be activated after a restart of the server."""
        self.catalogue.remember_active(name)

    async def register(self, name: str, source: str) -> None:
        """Add a name for an entry of the folders of variants, or an allowed Hub id, and prepare it.

        Raises the same errors as `Catalogue.register` and `prepare`; the name is not added then.
        """
        self.catalogue.register(name, source)
        try:
            await self.prepare(name)
        except BaseException:
            self.catalogue.unregister(name)
            raise

    async def unregister(self, name: str, drain: bool) -> None:
        """Remove a variant; with `drain`, wait for its requests, which are aborted after `drain_timeout`.

        Raises `UnknownVariantError`, and `VariantInUseError` if it has requests and `drain` is not set.
        """
        variant = self.catalogue.find(name)
        if (count := len(self.in_flight.get(variant, ()))) and not drain:
            raise VariantInUseError(f"{name} has {count} requests; wait for them with drain=true")
        digest = variant.version.digest if variant.version is not None else None
        self.catalogue.unregister(name)  # new requests no longer find it
        if not await self._has_none_within(variant, self.settings.drain_timeout):
            self._abort_requests(variant)
            await self._has_none_within(variant, ABORT_SECONDS)
        if not self.has(name):  # it may have been added again
            self._forget(name)
        if digest is not None and self.catalogue.name_of(digest) is None:
            self.cache.drop(digest)

    async def _has_none_within(self, variant: Variant, seconds: float) -> bool:
        """Whether the last request for a variant ends within so many seconds."""
        until = time.monotonic() + seconds
        while variant in self.in_flight and time.monotonic() < until:
            await asyncio.sleep(_POLL_SECONDS)
        return variant not in self.in_flight

    def _abort_requests(self, variant: Variant) -> None:
        error = UnknownVariantError(f"{variant.name} was removed while the request waited")
        for ticket in list(self.in_flight[variant]):
            if ticket.admission.done():
                ticket.abort()
            else:
                ticket.admission.set_exception(error)

    async def reload(self, name: str) -> None:
        """Read the files of a variant again, and retry a failed swap. Raises the same errors as `prepare`."""
        with ExitStack() as holds:
            variant = await self.catalogue.reload(name, self._preparation.preparing(name, holds))
            if variant.version is not None:
                self.driver.clear_failure(variant.version.digest)
            self._preparation.update_pin(variant)

    async def rollback(self, name: str, digest: str | None, hold: bool = False) -> None:
        """Roll back to an earlier version; see `Catalogue.rollback`."""
        with ExitStack() as holds:
            variant = await self.catalogue.rollback(name, digest, self._preparation.preparing(name, holds), hold)
            self._preparation.update_pin(variant)

    async def make_ready(self, name: str, version: Version) -> None:
        """Evaluate a version that a name is to move to. Raises `PeanutError` if it cannot be served."""
        with ExitStack() as holds:
            await self._preparation.preparing(name, holds)(version)

    def update_pin(self, name: str) -> None:
        """Pin the weights of the version that a name has moved to, if it is pinned; unpin those of a removed name."""
        if self.has(name):
            self._preparation.update_pin(self.catalogue.find(name))
        else:
            self._host.update_pin(name, False, None)

    async def pin(self, name: str, pinned: bool) -> None:
        """Keep the weights of a variant in host memory, or no longer. Raises the same errors as `prepare`."""
        if pinned:
            await self.prepare(name)  # what cannot be prepared is not recorded as pinned
        variant = self.catalogue.pin(name, pinned)
        self._preparation.update_pin(variant)

    def _forget(self, name: str) -> None:
        """Remove what was counted for a name that is no longer served."""
        metrics.forget(name)
        USAGE.forget_variant(name)
        self.usage.pop(name, None)
        self.driver.usage.pop(name, None)

    def _check_engine(self) -> None:
        if self._is_stopping:
            raise EngineDownError("the server is stopping", 5)
        self.driver.check_engine()

    def _weights_of(self, version: Version) -> str:
        return version.digest if version.has_own_weights else self.catalogue.base.digest
