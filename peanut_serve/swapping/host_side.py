"""Prepares what a version needs before a request for it is admitted, and before the engine is changed."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack

from peanut_serve.lora.folders import LoraFolders
from peanut_serve.swapping import metrics
from peanut_serve.swapping.swappable import SwappableEngine
from peanut_serve.variants.catalogue import Catalogue, Prepare, Variant
from peanut_serve.variants.evaluations import Evaluations
from peanut_serve.variants.host_cache import HostCache
from peanut_serve.variants.host_weights import HostWeights
from peanut_serve.variants.on_device.places import UpdatedTensor
from peanut_serve.variants.version import Version

logger = logging.getLogger("vllm.peanut_serve")


class HostSide:
    """Evaluates versions, and keeps held and pinned weights.

    Args:
        limit: of evaluated weights, in bytes.
        evaluations: bounds the evaluations.
        swappable: the engine whose model is served.

    Attributes:
        cache: the evaluated weights.
    """

    def __init__(self, limit: int, evaluations: Evaluations, swappable: SwappableEngine) -> None:
        self.cache = HostCache(limit, evaluations)
        self._model, self._base_weights, self._copies = swappable.model, swappable.base_weights, swappable.copies
        self._pinned: dict[str, str] = {}  # name -> digest

    @property
    def base_copy_bytes(self) -> int:
        """Size of the copies of the base, in host memory or on the devices."""
        return self._base_weights.nbytes + (self._copies.nbytes if self._copies is not None else 0)

    async def prepare(self, version: Version, holds: ExitStack, drops: bool = True) -> None:
        """Do everything that can fail before the engine is changed. The weights are held until `holds` is closed.

        Args:
            version: to prepare.
            holds: holds its weights.
            drops: drop weights of others to make room.

        Raises `HostMemoryError` if the weights do not fit, and what their evaluation raises.
        """
        # hold first: otherwise the weights may be dropped before the engine has them
        holds.enter_context(self.cache.holding(version.digest))
        start, is_known = time.perf_counter(), self.cache.get(version.digest) is not None
        weights = await self.cache.load(version, drops)
        await self._prepare_base(weights)
        if not is_known:
            seconds = time.perf_counter() - start
            metrics.EVALUATIONS.observe(seconds)
            logger.info("digest=%s evaluated_seconds=%.2f", version.digest[:12], seconds)
        metrics.HOST_CACHE.set(self.cache.nbytes)
        metrics.BASE_COPY.set(self.base_copy_bytes)

    async def _prepare_base(self, weights: HostWeights) -> None:
        """Keep W0 of what changes with some weights: on the devices for what is evaluated there."""
        names, on_device = self._model.with_neighbours(weights.places), frozenset[str]()
        if self._copies is not None:
            updated = [name for name, place in weights.places.items() if isinstance(place, UpdatedTensor)]
            await self._copies.prepare(self._model.with_neighbours(updated))
            on_device = frozenset(self._copies.kept)
        await self._base_weights.prepare(name for name in names if name not in on_device)

    def update_pin(self, name: str, is_pinned: bool, version: Version | None) -> None:
        """If a name is pinned, pin its version's weights; unpin those that were pinned for it before."""
        old = self._pinned.pop(name, None)
        digest = version.digest if version is not None else old
        if is_pinned and digest is not None:
            self._pinned[name] = digest
            self.cache.pin(digest, True)
        if old is not None and old not in self._pinned.values():
            self.cache.pin(old, False)


class Preparation:
    """Finds the current version of a variant, and prepares its weights or its LoRA adapter.

    Args:
        catalogue: the variants.
        host: where weights that are swapped in are prepared.
        lora: where LoRA adapters are prepared.
        pinned: names whose weights the settings keep in host memory.
        add_version: makes a version, whose weights are in host memory, available to swap to.

    Attributes:
        asked: name -> requests that wait for the preparation of its version.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        host: HostSide,
        lora: LoraFolders,
        pinned: Collection[str],
        add_version: Callable[[Version], None],
    ) -> None:
        self._catalogue, self._host, self._lora = catalogue, host, lora
        self._pinned, self._add_version = pinned, add_version
        self.asked = Counter[str]()

    async def current(self, name: str, holds: ExitStack) -> Version:
        """The current version of a variant, prepared; what it needs is held until `holds` is closed.

        Raises `UnknownVariantError`, `VariantError`.
        """
        self._catalogue.find(name)  # clients choose names: an unknown one is not counted
        self.asked[name] += 1
        try:
            variant, version = await self._catalogue.current(name, self.preparing(name, holds))
        finally:
            self.asked[name] -= 1
            if not self.asked[name]:
                del self.asked[name]
        self.update_pin(variant)
        return version

    def preparing(self, name: str, holds: ExitStack, drops: bool = True) -> Prepare:
        """A function that prepares a version, and holds what a request for it needs until `holds` is closed.

        Args:
            name: of the variant.
            holds: what holds it.
            drops: drop weights of others in host memory to make room.
        """

        async def prepare(version: Version) -> None:
            """Evaluate its weights, or its LoRA adapter."""
            if version.has_own_weights:
                await self._host.prepare(version, holds, drops)
                self._add_version(version)
            elif version.lora is not None:
                await self._lora.prepare(name, version, holds)

        return prepare

    def update_pin(self, variant: Variant) -> None:
        """Pin the weights of a variant's version, or unpin those that were pinned for it before."""
        self._host.update_pin(variant.name, self.is_pinned(variant), variant.version)

    def is_pinned(self, variant: Variant) -> bool:
        """Whether the weights of a variant are kept in host memory."""
        return variant.name in self._pinned or variant.record.pinned
