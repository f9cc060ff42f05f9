"""The names that can be asked for, and the version each stands for; a name moves to another version in one step."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import OptionError, PeanutError
from converters.serving import find_adapter
from peanut_serve.errors import TryLaterError, UnknownVariantError, VariantError, VariantNameError
from peanut_serve.variants.roots import AdapterRoots, State, VariantSource, looks_merged
from peanut_serve.variants.state_folder import Record, Records, VariantStore, all_digests
from peanut_serve.variants.version import FitsLora, LoadedModel, Version, adapter_version, checkpoint_version

logger = logging.getLogger("vllm.peanut_serve")

_TRIES = 3
_PREVIOUS = 5  # versions a name can go back to


@dataclass(eq=False)
class Variant:
    """A name.

    Attributes:
        name: what a request calls it.
        record: what is remembered of it.
        version: what it stands for; None until it was asked for.
        error: why it could not be had the last time.
    """

    name: str
    record: Record
    version: Version | None = None
    error: str | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


# makes sure that a version can be swapped to; raises `PeanutError` if it cannot
Prepare = Callable[[Version], Awaitable[None]]


class Catalogue:
    """Variants by name. For one event loop.

    Args:
        base_names: what the base is called.
        base: its version.
        roots: where variants are.
        store: what is remembered.
        model: what the engine loads.
        device: where f is evaluated.
        fits_lora: see `open_adapter`.
        prepare: called before a name moves to a version.
    """

    def __init__(
        self,
        base_names: Iterable[str],
        base: Version,
        roots: AdapterRoots,
        store: VariantStore,
        model: LoadedModel,
        device: str,
        fits_lora: FitsLora | None,
        prepare: Prepare,
    ) -> None:
        self._roots, self._store, self._model = roots, store, model
        self._device, self._fits_lora, self._prepare = device, fits_lora, prepare
        self.bases = {name: Variant(name, Record(source=str(model.base.folder)), base) for name in base_names}
        self.records: Records = store.load(model.base.fingerprint)
        store.keep_only(all_digests(self.records.variants))
        self._variants: dict[str, Variant] = {
            name: Variant(name, record) for name, record in self.records.variants.items()
        }

    def names(self) -> list[str]:
        """Every name that can be asked for, the base's first."""
        known = {name for name, variant in self._variants.items() if not variant.record.hidden}
        hidden = set(self._variants) - known
        return [*self.bases, *sorted((known | set(self._roots.names())) - hidden - set(self.bases))]

    def find(self, name: str) -> Variant:
        """What is known of a name, without looking at its files. Raises `UnknownVariantError`."""
        if name in self.bases:
            return self.bases[name]
        variant = self._variants.get(name)
        if variant is None and self._roots.is_there(name):
            variant = self._variants[name] = Variant(name, Record(source=name))
        if variant is None or variant.record.hidden:
            raise UnknownVariantError(f"there is no variant {name}; there are {', '.join(self.names())}")
        return variant

    def name_of(self, digest: str) -> str | None:
        """A name that stands for a version."""
        known = [*self.bases.values(), *self._variants.values()]
        return next((v.name for v in known if v.version is not None and v.version.digest == digest), None)

    async def current(self, name: str) -> tuple[Variant, Version]:
        """A name and the version it stands for now. If its files have changed, it moves to a new version first.

        Raises `UnknownVariantError`; and `VariantError` when the files cannot be served.
        """
        variant = self.find(name)
        if name in self.bases and variant.version is not None:
            return variant, variant.version
        async with variant.lock:
            source, state = await asyncio.to_thread(self._look, variant)
            version = variant.version
            if version is None or state != variant.record.seen:
                version = await self._renew(variant, source, state)
            return variant, version

    async def reload(self, name: str) -> Variant:
        """Read the files again, whether they have changed or not. Raises like `current`."""
        variant = self._own(name)
        async with variant.lock:
            source, state = await asyncio.to_thread(self._look, variant)
            variant.version = None
            variant.record.seen = ()
            await self._renew(variant, source, state)
        return variant

    async def rollback(self, name: str, digest: str | None) -> Variant:
        """Let a name stand for an earlier version, until its files change.

        Args:
            name: the variant.
            digest: of an earlier version, or its beginning; the one before by default.

        Raises `UnknownVariantError`; `VariantError` when there is no such version, or it cannot be had any more.
        """
        variant = self._own(name)
        async with variant.lock:
            known = list(variant.record.previous)
            if variant.error is not None and variant.record.digest is not None:
                known.insert(0, variant.record.digest)  # what it stood for until its files broke
            earlier = [one for one in known if digest is None or one.startswith(digest)]
            if not earlier:
                listed = ", ".join(one[:12] for one in known) or "none"
                raise VariantError(f"{name} has no such earlier version; it has {listed}")
            source, state = await asyncio.to_thread(self._look, variant)
            version = await asyncio.to_thread(self._reopen, variant, source, earlier[0])
            if version is None:
                raise VariantError(f"version {earlier[0][:12]} of {name} cannot be had any more")
            await self._move(variant, version, state)
        return variant

    def register(self, name: str, source: str) -> Variant:
        """Give something in the roots a name. Raises `VariantNameError`, `VariantError`."""
        is_hidden = name in self._variants and self._variants[name].record.hidden
        taken = name in self.bases or (name in self._variants and not is_hidden)
        if taken or (self._roots.find(name) is not None and not (is_hidden and name == source)):
            raise VariantNameError(f"{name} is a variant already; choose another name")
        if not self._roots.is_name(name):
            raise VariantNameError(f"{name!r} is no name: letters, digits, '.', '_' and '-', at most 128")
        if self._roots.find(source) is None:
            raise VariantError(f"there is no {source} in the folders of variants, and it is no allowed Hub id")
        variant = Variant(name, Record(source=source))
        self._save({name: variant.record})
        self._variants[name] = variant
        return variant

    def unregister(self, name: str) -> None:
        """Forget a name. Raises `UnknownVariantError`, `VariantNameError` for the base."""
        variant = self._own(name)
        if self._roots.find(name) is None:
            self._save({name: None})
            del self._variants[name]
        else:  # it would be found again
            hidden = Record(source=variant.record.source, hidden=True)
            self._save({name: hidden})
            self._variants[name] = Variant(name, hidden)

    def pin(self, name: str, pinned: bool) -> Variant:
        """Remember that the weights of a name stay on the host. Raises `UnknownVariantError`."""
        variant = self._own(name)
        pinning = variant.record.model_copy(update={"pinned": pinned})
        self._save({name: pinning})
        variant.record = pinning
        return variant

    def remember_active(self, name: str) -> None:
        """Remember what an operator has activated."""
        self._save({}, active=name)

    def _own(self, name: str) -> Variant:
        variant = self.find(name)
        if name in self.bases:
            raise VariantNameError(f"{name} is the base; it cannot be changed")
        return variant

    def _look(self, variant: Variant) -> tuple[VariantSource, State]:
        try:
            source = self._roots.find(variant.record.source)
        except OptionError as error:  # in two folders
            raise VariantError(str(error)) from None
        state = source.state() if source is not None else ()
        if source is None or not state:
            raise UnknownVariantError(f"the files of {variant.name} are gone")
        return source, state

    async def _renew(self, variant: Variant, source: VariantSource, state: State) -> Version:
        """Find out what a name stands for, and let it stand for that."""
        try:
            version = None
            if variant.record.digest is not None and state == variant.record.seen:  # as before a restart
                version = await asyncio.to_thread(self._reopen, variant, source, variant.record.digest)
            for _ in range(_TRIES):
                if version is not None:
                    break
                opened = await asyncio.to_thread(self._open, variant.name, source)
                before, state = state, await asyncio.to_thread(source.state)
                version = opened if state == before else None
            if version is None:
                raise VariantError(f"{variant.name} is being written; try again when it is whole")
            await self._move(variant, version, state)
            return version
        except (PeanutError, OSError) as error:
            variant.error = " ".join(str(error).split())
            variant.version = None
            if isinstance(error, UnknownVariantError | TryLaterError):
                raise
            raise VariantError(f"the variant {variant.name} cannot be served: {variant.error}") from error

    async def _move(self, variant: Variant, version: Version, state: State) -> None:
        await self._prepare(version)
        old = variant.record
        previous = [digest for digest in [old.digest, *old.previous] if digest not in (None, version.digest)]
        moved = old.model_copy(update={"digest": version.digest, "previous": previous[:_PREVIOUS], "seen": state})
        if self._variants.get(variant.name) is variant:  # else it was unregistered meanwhile, and serves a last time
            self._save({variant.name: moved})
        variant.record, variant.version, variant.error = moved, version, None
        logger.info("variant=%s digest=%s kind=%s", variant.name, version.digest[:12], version.kind.value)

    def _open(self, name: str, source: VariantSource) -> Version:
        spec = source.spec
        if isinstance(spec, Path) and looks_merged(spec):
            return checkpoint_version(name, spec, self._model)
        path = spec if isinstance(spec, Path) else find_adapter(spec).path
        copy = self._store.copy_theta(path)
        try:
            digest = adapter_version(name, copy, self._model, self._device, self._fits_lora).digest
        except BaseException:
            self._store.discard(copy)
            raise
        kept = self._store.keep(copy, digest)
        return adapter_version(name, kept, self._model, self._device, self._fits_lora)

    def _reopen(self, variant: Variant, source: VariantSource, digest: str) -> Version | None:
        """A version a name stood for, if it can still be had."""
        kept = self._store.theta(digest)
        if kept is not None:
            version = adapter_version(variant.name, kept, self._model, self._device, self._fits_lora)
        elif isinstance(source.spec, Path) and looks_merged(source.spec):
            version = checkpoint_version(variant.name, source.spec, self._model)
        else:
            return None
        return version if version.digest == digest else None

    def _save(self, changed: Mapping[str, Record | None], **others: str) -> None:
        """Remember changed records, None for one to forget; nothing changes in memory unless they are on the disk."""
        old = self.records.variants
        variants = {name: record for name, record in {**old, **changed}.items() if record is not None}
        records = self.records.model_copy(update={"variants": variants, **others})
        self._store.save(records)
        self.records = records
        self._store.forget(all_digests(old) - all_digests(variants))
