"""Implements `schema.Control`, the operations of the admin API, on a `VariantServer`."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone

from peanut_serve.swapping import metrics
from peanut_serve.swapping.requests import Usage
from peanut_serve.swapping.server import VariantServer
from peanut_serve.web.schema import EngineStatus, SwapStatus, VariantState, VariantStatus, VariantTraffic


class VariantControl:
    """Lists and changes the variants of a server."""

    def __init__(self, server: VariantServer) -> None:
        self._server = server
        self._preparing: Counter[str] = Counter()  # name -> number of operations in progress

    async def variants(self) -> list[VariantStatus]:
        """The state of every variant, including the base."""
        return [self.variant(name) for name in await self._server.names(missing=True) if self._server.has(name)]

    def variant(self, name: str) -> VariantStatus:
        """The state of one variant."""
        facts = self._server.facts(name)
        is_preparing = self._preparing[name] > 0
        return VariantStatus(
            name=facts.name,
            kind=facts.kind.value,
            state=VariantState.PREPARING if is_preparing else VariantState(facts.availability.value),
            digest=facts.digest,
            previous=list(facts.previous),
            source=facts.source,
            host_bytes=facts.host_bytes,
            evictable_bytes=facts.evictable_bytes,
            pinned=facts.is_pinned,
            held=facts.is_held,
            running=facts.running,
            waiting=facts.waiting,
            requests=facts.requests,
            last_used=datetime.fromtimestamp(facts.last_used, timezone.utc) if facts.last_used is not None else None,
            swaps=facts.swaps,
            last_swap_seconds=facts.last_swap_seconds,
            error=facts.error,
        )

    def engine(self) -> EngineStatus:
        """The state of the engine."""
        facts = self._server.engine_facts()
        return EngineStatus(
            state=facts.state,
            active=facts.active,
            digest=facts.digest,
            restarts=facts.restarts,
            host_cache_bytes=facts.host_cache_bytes,
            host_cache_limit=facts.host_cache_limit,
            base_copy_bytes=facts.base_copy_bytes,
            swap_seconds=dict(facts.swap_seconds),
            kv_cache_usage=metrics.kv_cache_usage(),
            detail=facts.detail,
        )

    def swaps(self) -> list[SwapStatus]:
        """The latest swaps and restarts, the newest first."""
        found = self._server.driver.history.latest()
        times = (datetime.fromtimestamp(record.at, timezone.utc) for record in found)
        return [SwapStatus(**{**asdict(record), "at": at}) for record, at in zip(found, times, strict=True)]

    async def traffic(self) -> list[VariantTraffic]:
        """The requests for every variant."""
        names, tokens = await self._server.names(missing=True), metrics.tokens()
        return [self._traffic(name, tokens.get(name, {})) for name in names if self._server.has(name)]

    def _traffic(self, name: str, tokens: Mapping[str, int]) -> VariantTraffic:
        usage = self._server.usage.get(name, Usage())
        return VariantTraffic(
            name=name,
            answered=usage.answered,
            failed=usage.outcomes.total() - usage.answered,
            outcomes=dict(usage.outcomes),
            prompt_tokens=tokens.get("prompt", 0),
            generated_tokens=tokens.get("generated", 0),
            p50_seconds=usage.quantile(0.5),
            p95_seconds=usage.quantile(0.95),
        )

    async def register(self, name: str, source: str) -> VariantStatus:
        """Add a variant and evaluate it. If the evaluation fails, nothing is added."""
        with self._shown_as_preparing(name):
            await self._server.register(name, source)
        return self.variant(name)

    async def unregister(self, name: str, drain: bool) -> None:
        """Remove a variant; with `drain`, after its last request."""
        await self._server.unregister(name, drain)

    async def activate(self, name: str) -> VariantStatus:
        """Swap a variant in, and record it so that the next start activates it."""
        await self._server.activate(name)
        self._server.remember_active(name)
        return self.variant(name)

    async def reload(self, name: str) -> VariantStatus:
        """Reload a variant from its source."""
        with self._shown_as_preparing(name):
            await self._server.reload(name)
        return self.variant(name)

    async def rollback(self, name: str, digest: str | None, hold: bool) -> VariantStatus:
        """Roll back to an earlier version."""
        with self._shown_as_preparing(name):
            await self._server.rollback(name, digest, hold)
        return self.variant(name)

    async def preload(self, name: str) -> VariantStatus:
        """Evaluate the weights of a variant into host memory."""
        with self._shown_as_preparing(name):
            await self._server.prepare(name)
        return self.variant(name)

    async def pin(self, name: str, pinned: bool) -> VariantStatus:
        """Pin the weights of a variant in host memory, or unpin them."""
        with self._shown_as_preparing(name):
            await self._server.pin(name, pinned)
        return self.variant(name)

    @contextmanager
    def _shown_as_preparing(self, name: str) -> Iterator[None]:
        self._preparing[name] += 1
        try:
            yield
        finally:
            self._preparing[name] -= 1
            if not self._preparing[name]:
                del self._preparing[name]  # of names that do not exist, too
