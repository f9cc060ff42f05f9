"""What the admin API asks of a `VariantServer`; see `control.py`."""

import asyncio
from datetime import datetime, timezone
from pathlib import Path

from converters.errors import OptionError
from peanut_serve.errors import VariantInUseError
from peanut_serve.swapping.driver import SwapUsage
from peanut_serve.swapping.server import Usage, VariantServer
from peanut_serve.variants.catalogue import Variant
from peanut_serve.variants.roots import looks_merged
from peanut_serve.variants.version import VariantKind
from peanut_serve.web.schema import EngineStatus, VariantState, VariantStatus

_POLL_SECONDS = 0.05


class VariantControl:
    """Lists and changes the variants of a server."""

    def __init__(self, server: VariantServer) -> None:
        self._server = server
        self._preparing: set[str] = set()

    def variants(self) -> list[VariantStatus]:
        """Every variant, the base too."""
        return [self.variant(name) for name in self._server.catalogue.names()]

    def variant(self, name: str) -> VariantStatus:
        """One of them."""
        server = self._server
        variant = server.catalogue.find(name)
        usage, swaps = server.usage.get(name, Usage()), server.driver.usage.get(name, SwapUsage())
        digest = variant.version.digest if variant.version is not None else variant.record.digest
        weights = server.cache.get(digest) if digest is not None else None
        ran = sum(ticket.digest == digest for ticket in server.gate.running)
        return VariantStatus(
            name=name,
            kind=_kind(variant, server).value,
            state=self._state(variant, digest),
            digest=digest,
            previous=variant.record.previous,
            source=variant.record.source,
            host_bytes=weights.nbytes if weights is not None else 0,
            pinned=variant.record.pinned or name in server.settings.pin,
            running=ran,
            waiting=server.gate.waiting(digest) if digest is not None else 0,
            requests=usage.requests,
            last_used=datetime.fromtimestamp(usage.last_used, timezone.utc) if usage.last_used is not None else None,
            swaps=swaps.swaps,
            last_swap_seconds=swaps.last_seconds,
            error=variant.error or server.driver.failure(digest),
        )

    def engine(self) -> EngineStatus:
        """The engine."""
        server = self._server
        digest = server.swapper.active.version.digest
        return EngineStatus(
            state=server.driver.state,
            active=server.catalogue.name_of(digest) or digest[:12],
            digest=digest,
            restarts=server.swapper.restarts,
            host_cache_bytes=server.cache.nbytes,
            host_cache_limit=server.cache.limit,
            swap_seconds={phase.value: seconds for phase, seconds in server.driver.last_report.seconds.items()},
            detail=server.driver.detail,
        )

    async def register(self, name: str, source: str) -> VariantStatus:
        """Add a variant, and see whether it can be served. Nothing is added if it cannot."""
        self._server.catalogue.register(name, source)
        try:
            await self._prepare(name)
        except BaseException:
            self._server.catalogue.unregister(name)
            raise
        return self.variant(name)

    async def unregister(self, name: str, drain: bool) -> None:
        """Remove a variant, after the last of its requests if `drain`."""
        server = self._server
        variant = server.catalogue.find(name)
        if server.in_flight[name] and not drain:
            raise VariantInUseError(f"{name} has {server.in_flight[name]} requests; wait for them with drain=true")
        digest = variant.version.digest if variant.version is not None else None
        server.catalogue.unregister(name)  # no request finds it any more
        while server.in_flight[name]:
            await asyncio.sleep(_POLL_SECONDS)
        server.usage.pop(name, None)
        if digest is not None and server.catalogue.name_of(digest) is None:
            server.cache.drop(digest)

    async def activate(self, name: str) -> VariantStatus:
        """Swap a variant's weights in; remembered for the next start."""
        await self._server.activate(name)
        self._server.catalogue.remember_active(name)
        return self.variant(name)

    async def reload(self, name: str) -> VariantStatus:
        """Read its source again."""
        variant = await self._server.catalogue.reload(name)
        if variant.version is not None:
            self._server.driver.forgive(variant.version.digest)
        await self._prepare(name)
        return self.variant(name)

    async def rollback(self, name: str, digest: str | None) -> VariantStatus:
        """Go back to an earlier version."""
        await self._server.catalogue.rollback(name, digest)
        await self._prepare(name)
        return self.variant(name)

    async def pin(self, name: str, pinned: bool) -> VariantStatus:
        """Keep its weights on the host, or no longer."""
        variant = self._server.catalogue.pin(name, pinned)
        if pinned:
            await self._prepare(name)
        self._server.follow_pin(variant, variant.version)
        return self.variant(name)

    async def _prepare(self, name: str) -> None:
        self._preparing.add(name)
        try:
            await self._server.current(name)
        finally:
            self._preparing.discard(name)

    def _state(self, variant: Variant, digest: str | None) -> VariantState:
        server = self._server
        if variant.name in self._preparing:
            return VariantState.PREPARING
        if variant.error is not None or server.driver.failure(digest) is not None:
            return VariantState.FAILED
        if digest == server.swapper.active.version.digest:
            return VariantState.ACTIVE
        on_host = digest is not None and server.cache.get(digest) is not None
        needs_none = variant.version is not None and variant.version.kind in (VariantKind.BASE, VariantKind.LORA)
        return VariantState.READY if on_host or needs_none else VariantState.REGISTERED


def _kind(variant: Variant, server: VariantServer) -> VariantKind:
    if variant.version is not None:
        return variant.version.kind
    try:
        source = server.roots.find(variant.record.source)
    except OptionError:  # in two folders
        source = None
    is_merged = source is not None and isinstance(source.spec, Path) and looks_merged(source.spec)
    return VariantKind.CHECKPOINT if is_merged else VariantKind.ADAPTER
