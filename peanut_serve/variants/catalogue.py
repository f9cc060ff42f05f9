"""The version that each name refers to. A name moves to another version atomically."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from converters.errors import PeanutError
from peanut_serve.errors import TryLaterError, UnknownVariantError, VariantError
from peanut_serve.variants.kept_theta import has_theta
from peanut_serve.variants.listing import judged_by_files
from peanut_serve.variants.names import Names, Variant
from peanut_serve.variants.opening import VersionOpener
from peanut_serve.variants.reading import VersionReader
from peanut_serve.variants.roots import AdapterRoots, State, VariantSource
from peanut_serve.variants.state_folder import Record, VariantStore
from peanut_serve.variants.version import Version

__all__ = ["Catalogue", "Prepare", "Variant", "moved_to"]

logger = logging.getLogger("vllm.peanut_serve")

_PREVIOUS = 5  # earlier versions that are kept for rollback

# prepares a swap to a version; raises `PeanutError` if that is not possible
Prepare = Callable[[Version], Awaitable[None]]


class Catalogue(Names):
    """Variants by name, and how they move to other versions. For one event loop.

    Args:
        base_names, roots, store: see `Names`.
        opener: opens versions of the variants.
        settle: seconds that files must not have changed for before a new version is taken from them.

    Attributes:
        reader: reads versions from files, or from what the state folder keeps.
    """

    def __init__(
        self,
        base_names: Iterable[str],
        roots: AdapterRoots,
        store: VariantStore,
        opener: VersionOpener,
        settle: float = 1.0,
    ) -> None:
        judge = partial(judged_by_files, lora=opener.lora, merges=opener.merges)
        super().__init__(base_names, roots, store, opener.model.base, judge)
        self.reader = VersionReader(roots, store, opener, settle)

    async def current(self, name: str, prepare: Prepare) -> tuple[Variant, Version]:
        """A variant and its current version, prepared. If its files have changed, it moves to a new version first.

        Args:
            name: of a variant or the base.
            prepare: awaited once with the version, before the name moves to it; not called for the base.

        Raises `UnknownVariantError`, `VariantError` if the files cannot be served, and what `prepare` raises.
        """
        variant = self.find(name)
        if name in self.bases and variant.version is not None:
            return variant, variant.version
        async with variant.lock:
            source, state = await asyncio.to_thread(self.reader.look, name, variant.record.source)
            version = variant.version
            if version is None or (state != variant.record.seen and not variant.record.held):
                return variant, await self._renew(variant, source, state, prepare)
        await prepare(version)
        return variant, version

    async def reload(self, name: str, prepare: Prepare) -> Variant:
        """Read the files again, whether they have changed or not. If that fails, a version that is held stays held.

        Raises the same errors as `current`.
        """
        variant = self._unreleased(name)
        async with variant.lock:
            self._unreleased(name)  # a release may have begun
            source, state = await asyncio.to_thread(self.reader.look, name, variant.record.source)
            variant.version = None
            try:
                await self._renew(variant, source, state, prepare, reads_files=True)
            except BaseException:
                if not variant.record.held:  # or the next request reads them again
                    variant.record = variant.record.model_copy(update={"seen": ()})
                raise
        return variant

    def earlier(self, variant: Variant) -> list[str]:
        """Digests of the versions that a variant can be rolled back to, the latest first."""
        known = list(variant.record.previous)
        if variant.error is not None and variant.record.digest is not None:
            known.insert(0, variant.record.digest)  # the current version, if its files can no longer be read
        return known

    def _earlier_one(self, variant: Variant, digest: str | None) -> str:
        """The digest of the version that an operator means. Raises `VariantError` if there is none, or several."""
        if digest is not None and (digest == variant.record.digest or has_theta(self._store.folder, digest)):
            return digest
        known = list(dict.fromkeys(self.earlier(variant)))
        found = known[:1] if digest is None else [one for one in known if one.startswith(digest)]
        if len(found) == 1:
            return found[0]
        listed = ", ".join(one[:12] for one in (found or known)) or "none"
        if not found:
            raise VariantError(f"{variant.name} has no such earlier version; its earlier versions are {listed}")
        raise VariantError(f"several versions of {variant.name} may be meant: {listed}; give more of the digest")

    async def rollback(self, name: str, digest: str | None, prepare: Prepare, hold: bool = False) -> Variant:
        """Move a name to an earlier version, until its files change, or with `hold` until it is reloaded.

        Args:
            name: of a variant.
            digest: of an earlier version, or a prefix of it; by default, of the previous version. The full digest of
                any version whose θ the state folder has is accepted, too.
            prepare: as for `current`.
            hold: whether changes of the files are ignored from now on.

        Raises `UnknownVariantError`, and `VariantError` if there is no such version, there are several, or it is no
        longer available.
        """
        variant = self._unreleased(name)
        async with variant.lock:
            self._unreleased(name)  # a release may have begun
            earlier = self._earlier_one(variant, digest)
            source, state = await asyncio.to_thread(self.reader.look, name, variant.record.source)
            version = await asyncio.to_thread(self.reader.reopen, name, source, earlier)
            if version is None:
                raise VariantError(f"version {earlier[:12]} of {name} is no longer available")
            await self._move(variant, version, state, prepare, hold)
        return variant

    async def _renew(
        self, variant: Variant, source: VariantSource, state: State, prepare: Prepare, reads_files: bool = False
    ) -> Version:
        """Open the version that is in the files now, and move the name to it.

        Unless `reads_files`, that is the known version if it is held, or if the files are unchanged since a restart.
        """
        try:
            version, known = None, None if reads_files else variant.record.digest
            held = variant.record.held and not reads_files
            if known is not None and (held or state == variant.record.seen):
                version = await asyncio.to_thread(self.reader.reopen, variant.name, source, known)
                if version is None and held:
                    raise VariantError(
                        f"a rollback or release holds its version {known[:12]}, which is no longer available; reload "
                        "it, or roll back to another version"
                    )
            if version is None:
                version, state = await self.reader.read(variant.name, source, state)
            await self._move(variant, version, state, prepare, held)
            return version
        except TryLaterError:
            raise  # nothing is wrong with it
        except (PeanutError, OSError) as error:
            variant.error = " ".join(str(error).split())
            variant.version = None
            if isinstance(error, UnknownVariantError):
                raise
            raise VariantError(f"the variant {variant.name} cannot be served: {variant.error}") from error

    async def _move(self, variant: Variant, version: Version, state: State, prepare: Prepare, held: bool) -> None:
        await prepare(version)
        old = variant.record
        moved = moved_to(old, version.digest, seen=state, held=held)
        is_listed = self._variants.get(variant.name) is variant  # if not, it was removed, and serves a last request
        if is_listed and self.records.variants.get(variant.name) != moved:  # a full disk stops only what is new
            self._save({variant.name: moved})
        variant.record, variant.version, variant.error = moved, version, None
        logger.info("variant=%s digest=%s kind=%s", variant.name, version.digest[:12], version.kind.value)


def moved_to(old: Record, digest: str, **changed: object) -> Record:
    """The record of a name after it has moved to a version, with the versions before for a rollback.

    Args:
        old: its record before.
        digest: of the version.
        changed: other fields of the record.
    """
    previous = [known for known in [old.digest, *old.previous] if known not in (None, digest)]
    return old.model_copy(update={"digest": digest, "previous": previous[:_PREVIOUS], **changed})
