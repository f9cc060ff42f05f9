"""The variants whose merged weights the engine may have while all that LoRA can express share it.

With the weights of the base, each of them is a LoRA adapter. With the merged weights of one of them, the resident,
that one needs no adapter, and every other one, the base included, is a complement
(`peanut_serve/lora/complement.py`). The adapter of a request is found after it was admitted, for the weights that the
engine has then; they do not change before it has ended. A complement has a number and a path of its own for each
pair, and names the resident's weights in its manifest, so that nothing can take it for one of other weights.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from peanut_serve.errors import VariantError
from peanut_serve.lora.cache import LoraCache
from peanut_serve.lora.complement import complement_export
from peanut_serve.lora.folders import LoraFolder, LoraFolders
from peanut_serve.variants.version import VariantKind, Version, digest_of

logger = logging.getLogger("vllm.peanut_serve")

# it saves more than another; --resident names it; a variant has no complement beside the one before; that one is no
# longer served; the change to another one failed; others need the memory of the one before
Why = Literal["saves", "fixed", "unfit", "gone", "failed", "memory"]


@dataclass(frozen=True, eq=False)
class Resident:
    """A variant that is served as LoRA, and can be merged.

    Attributes:
        name: of the variant, for people.
        version: as LoRA: the identity of what is asked for.
        merged: the same θ as merged weights.
    """

    name: str
    version: Version
    merged: Version


class Residents:
    """For one event loop.

    Args:
        base: the base's version.
        plain: LoRA adapters of the base's weights.
        complements: LoRA adapters of merged weights.
        cache: where both are.
        max_rank: largest rank that the engine takes as LoRA.

    Attributes:
        wanted: whose merged weights the engine should have when requests share it; None for those of the base.
        why: the reason for that.
        in_engine: whose merged weights it has, or had when requests shared it last; None for those of the base.
        base: the version of the base.
    """

    def __init__(
        self, base: Version, plain: LoraFolders, complements: LoraFolders, cache: LoraCache, max_rank: int
    ) -> None:
        self.wanted: Resident | None = None
        self.in_engine: Resident | None = None
        self.why: Why | None = None
        self.base, self._plain, self._complements = base, plain, complements
        self._cache, self._max_rank = cache, max_rank
        self._held: dict[str, tuple[Resident, ExitStack]] = {}  # by the digest of the merged weights

    # weights

    def at(self, weights: str) -> Resident | None:
        """The variant with these merged weights, if they are shared by complements; None for those of the base."""
        held = self._held.get(weights)
        return held[0] if held is not None else None

    def turn_of(self, weights: str) -> str:
        """The digest that requests wait for if these weights can answer them; the base's if they share them."""
        return self.base.digest if weights in self._held else weights

    def weights_for(self, turn: str, weights: str, left: Callable[[str], float]) -> str:
        """Digest of the weights to load for a turn: those of the wanted resident, unless that has just failed.

        Args:
            turn: the digest that requests wait for.
            weights: digest of those that the engine has.
            left: seconds until a swap to weights may be tried again, as it has failed; not positive if it may.
        """
        is_resident = self.wanted is not None and turn == self.base.digest
        target = self.wanted.merged.digest if self.wanted is not None and is_resident else turn
        if left(target) > 0:
            return weights if self.turn_of(weights) == turn else turn  # those that are there, if they will do
        return target

    def identity(self, weights: str) -> str:
        """The digest of the version that these weights answer without an adapter."""
        resident = self.at(weights)
        return resident.version.digest if resident is not None else weights

    def want(self, resident: Resident | None, why: Why, holds: ExitStack | None = None) -> None:
        """Want other merged weights, or None for those of the base.

        Args:
            resident: its LoRA adapter and its merged weights are on the host.
            why: the reason.
            holds: keeps them there; it is closed when they are neither wanted nor in the engine. Without it, a
                resident whose weights are not kept any more counts as None.
        """
        if holds is None and resident is not None and resident.merged.digest not in self._held:
            resident = None
        if holds is not None and resident is not None:
            old = self._held.get(resident.merged.digest)
            self._held[resident.merged.digest] = resident, holds
            if old is not None:
                old[1].close()
        self.wanted, self.why = resident, why
        logger.info("resident=%s why=%s", resident.name if resident is not None else "base", why)

    def settle(self, weights: str) -> None:
        """Release those that are neither wanted nor in the engine, which has these weights now."""
        if self.turn_of(weights) == self.base.digest:
            self.in_engine = self.at(weights)
        keep = {weights, self.wanted.merged.digest if self.wanted is not None else None}
        for digest in self._held.keys() - keep:
            self._held.pop(digest)[1].close()

    def give_way(self, weights: str) -> None:
        """Release the merged weights of the wanted resident if the engine does not have them: others need the memory.

        Args:
            weights: digest of those that it has.
        """
        if self.wanted is not None and self.wanted.merged.digest != weights:
            self.want(self.at(weights), "memory")
            self.settle(weights)

    # complements

    def refusal(self, version: Version, resident: Resident) -> str | None:
        """Why a version cannot be answered while another one is the resident; None if it can."""
        if version.digest == resident.version.digest:
            return None
        ranks = [one.lora.rank if one.lora is not None else 0 for one in (version, resident.version)]
        if None in ranks:
            return f"there is no complement of experts beside {resident.name}"
        if (together := sum(rank or 0 for rank in ranks)) > self._max_rank:
            return (
                f"its rank is {ranks[0]} and that of {resident.name} {ranks[1]}, together {together}, but vLLM runs "
                f"with --max-lora-rank {self._max_rank}"
            )
        return None

    def fits(self, version: Version) -> Callable[[str], bool]:
        """Whether a version can be answered with weights of its turn, by their digest."""

        def is_answered_with(weights: str) -> bool:
            resident = self.at(weights)
            return resident is None or self.refusal(version, resident) is None

        return is_answered_with

    async def prepare(self, name: str, version: Version, weights: str, holds: ExitStack) -> None:
        """Write the complement that a version needs with these weights, if any; held until `holds` is closed."""
        resident = self.at(weights)
        if resident is not None and self._is_complement(version, resident) and self.fits(version)(weights):
            await self._complements.prepare(name, self._complement(version, resident), holds)

    async def adapter(self, name: str, version: Version, weights: str, holds: ExitStack) -> LoraFolder | None:
        """The LoRA adapter that a version needs with these weights, loaded into the engine; None if it needs none.

        Args:
            name: of the variant.
            version: prepared and held.
            weights: digest of those that the engine has, and keeps until the request has ended.
            holds: keeps the adapter on disk until it is closed.

        Raises `VariantError` if there is none, or vLLM cannot load it; `EngineDownError` if the engine dies.
        """
        resident = self.at(weights)
        if resident is None:
            return await self._plain.load(name, version) if version.lora is not None else None
        if not self._is_complement(version, resident):
            return None
        if (refusal := self.refusal(version, resident)) is not None:
            raise VariantError(f"{name}: {refusal}; send the request again")
        complement = self._complement(version, resident)
        await self._complements.prepare(name, complement, holds)
        return replace(await self._complements.load(name, complement), resident=weights)

    def _is_complement(self, version: Version, resident: Resident) -> bool:
        return not version.has_own_weights and version.digest != resident.version.digest

    def _complement(self, version: Version, resident: Resident) -> Version:
        weights, export = resident.merged.digest, resident.version.lora
        if export is None:
            raise VariantError(f"{resident.name} is not served as LoRA, and so cannot be a resident")
        own = complement_export(version.lora, export, weights, self._cache)
        return Version(digest_of("complement", version.digest, weights), VariantKind.LORA, lora=own)
