"""What a server tells of itself: facts of its variants and its engine, for monitoring and for operators."""

import asyncio

from peanut_serve.lora.slots import AdapterSlots
from peanut_serve.settings.server import ServerSettings
from peanut_serve.swapping.driver import SwapDriver
from peanut_serve.swapping.facts import Availability, EngineFacts, VariantFacts
from peanut_serve.swapping.gate import Gate, Places
from peanut_serve.swapping.history import SwapUsage
from peanut_serve.swapping.host_side import HostSide, Preparation
from peanut_serve.swapping.metrics import Residency
from peanut_serve.swapping.requests import Usage
from peanut_serve.swapping.transaction import Swapper
from peanut_serve.variants.catalogue import Catalogue, Variant
from peanut_serve.variants.host_cache import HostCache

_MOST_FAILED_STARTS = 5  # of the engine in a row: half a minute of pauses, and the starts themselves


class ObservedServer:
    """The part of a `VariantServer` that only reads."""

    settings: ServerSettings
    catalogue: Catalogue
    swapper: Swapper
    driver: SwapDriver
    gate: Gate
    places: Places
    slots: AdapterSlots
    cache: HostCache
    usage: dict[str, Usage]
    _host: HostSide
    _listed: set[str]  # names that requests can use, and those that are gone but still used
    _preparation: Preparation
    _driving: asyncio.Task[None] | None
    _is_stopping: bool

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered, now or after a swap."""
        return self.driver.is_up and not self._is_stopping

    @property
    def is_alive(self) -> bool:
        """False if a restart of this process is the cure: no engine starts any more, or nothing starts one."""
        if self._is_stopping or self._driving is None:
            return True
        return not self._driving.done() and self.driver.failed_starts < _MOST_FAILED_STARTS

    @property
    def base_name(self) -> str:
        """The variant that answers a request without a variant: the base."""
        return next(iter(self.catalogue.bases))

    @property
    def last_activated(self) -> str | None:
        """The variant that an operator activated last, possibly before a restart."""
        return self.catalogue.records.active

    def facts(self, name: str) -> VariantFacts:
        """The current facts of a variant. Raises `UnknownVariantError`."""
        variant = self.catalogue.find(name)
        usage, swaps = self.usage.get(name, Usage()), self.driver.usage.get(name, SwapUsage())
        digest = variant.version.digest if variant.version is not None else variant.record.digest
        weights = self.cache.get(digest) if digest is not None else None
        return VariantFacts(
            name=name,
            kind=self.catalogue.kind_of(variant),
            availability=self._availability(variant, digest),
            digest=digest,
            previous=tuple(self.catalogue.earlier(variant)),
            source=variant.record.source,
            host_bytes=weights.nbytes if weights is not None else 0,
            evictable_bytes=self.cache.evictable(digest) if digest is not None else 0,
            is_pinned=self._preparation.is_pinned(variant),
            is_held=variant.record.held,
            running=self.gate.running_names().count(name),
            waiting=self.gate.waiting_names().count(name),
            requests=usage.requests,
            last_used=usage.last_used,
            swaps=swaps.swaps,
            last_swap_seconds=swaps.last_seconds,
            error=variant.error or self.driver.failure(digest),
        )

    def _availability(self, variant: Variant, digest: str | None) -> Availability:
        if variant.error is not None or self.driver.failure(digest) is not None:
            return Availability.FAILED
        if digest == self.swapper.active.version.digest:
            return Availability.ACTIVE
        is_on_host = digest is not None and self.cache.get(digest) is not None
        needs_none = variant.version is not None and not variant.version.has_own_weights
        return Availability.READY if is_on_host or needs_none else Availability.REGISTERED

    def engine_facts(self) -> EngineFacts:
        """The current facts of the engine."""
        digest = self.swapper.active.version.digest
        return EngineFacts(
            state=self.driver.state,
            detail=self.driver.detail,
            active=self.catalogue.name_of(digest) or digest[:12],
            digest=digest,
            restarts=self.swapper.restarts,
            host_cache_bytes=self.cache.nbytes,
            host_cache_limit=self.cache.limit,
            base_copy_bytes=self._host.base_copy_bytes,
            swap_seconds={phase.value: seconds for phase, seconds in self.driver.last_report.seconds.items()},
        )

    def residency(self) -> Residency:
        """What the engine has, and what requests wait for."""
        active = self.swapper.active.version.digest
        known = self.catalogue.names_by_digest()
        names = {digest: [name for name in own if name in self._listed] for digest, own in known.items()}
        is_up, swaps = self.driver.is_up, self.settings.mode != "lora"
        takes_lora = is_up and active == self.catalogue.base.digest  # adapters are those of the base's weights
        resident = names.get(active, []) if is_up else []
        loaded = [name for digest in self.slots.loaded() for name in names.get(digest, [])] if takes_lora else []
        running = [*(resident if swaps else []), *loaded]
        in_engine = [name for digest in self.slots.waiting() for name in names.get(digest, [])]
        waiting = {*self._preparation.asked, *self.gate.waiting_names(), *in_engine}
        cached = {name: self.cache.get(digest) for digest, own in names.items() for name in own}
        return Residency(
            resident=tuple(resident),
            loaded=tuple(loaded),
            running=tuple(running),
            waiting=tuple(sorted(waiting - {*running})),
            limit=swaps * is_up + takes_lora * self.slots.count,
            host_bytes={name: weights.nbytes for name, weights in cached.items() if weights is not None},
            queued=self.places.taken,
        )
