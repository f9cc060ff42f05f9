"""The names that requests can use, and what is recorded of them."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters import Checkpoint
from converters.errors import OptionError
from peanut_serve.errors import UnknownVariantError, VariantError, VariantInUseError, VariantNameError, shown
from peanut_serve.settings.versions import CURRENT, STAGED, staged_name
from peanut_serve.variants.listing import Judge, Listing
from peanut_serve.variants.roots import AdapterRoots, looks_merged
from peanut_serve.variants.state_folder import Record, Records, VariantStore, all_digests
from peanut_serve.variants.version import VariantKind, Version, base_version

_SHOWN = 10  # names in a message
_NONE: Mapping[str, Version] = {}


@dataclass(eq=False)
class Variant:
    """A name that requests can use.

    Attributes:
        name: the name in requests.
        record: its state on disk.
        version: the version it refers to; None until it is first requested.
        error: why opening or preparing it failed the last time.
    """

    name: str
    record: Record
    version: Version | None = None
    error: str | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Names:
    """Variants by name. For one event loop.

    Args:
        base_names: names of the base.
        roots: where variants are looked up.
        store: the state folder.
        checkpoint: the base.
        judge: says of which kind a variant is that was not requested yet.

    Attributes:
        base: its version.
        bases: the base by its names.
        records: what is recorded of all other names.
    """

    def __init__(
        self,
        base_names: Iterable[str],
        roots: AdapterRoots,
        store: VariantStore,
        checkpoint: Checkpoint,
        judge: Judge,
    ) -> None:
        self._roots, self._store = roots, store
        self._listing = Listing(roots, judge)
        self.base = base_version(checkpoint)
        self.bases = {name: Variant(name, Record(source=str(checkpoint.folder)), self.base) for name in base_names}
        self.records: Records = store.load(checkpoint.fingerprint)
        store.keep_only(all_digests(self.records.variants))
        self._variants: dict[str, Variant] = {
            name: Variant(name, record) for name, record in self.records.variants.items()
        }

    async def names(self, missing: bool = False) -> list[str]:
        """Every name that a request can use, the base's first. The folders are read at most once a second.

        Args:
            missing: also names in the records whose files were removed.
        """
        return self._with_names(await self._listing.names(), missing)

    def _with_names(self, in_roots: Iterable[str], missing: bool = False) -> list[str]:
        found = set(in_roots)
        records = {name: variant.record for name, variant in self._variants.items()}
        hidden = {name for name, record in records.items() if record.hidden}
        known = {name for name, record in records.items() if missing or record.source in found}
        return [*self.bases, *sorted((known | found) - hidden - set(self.bases))]

    def find(self, name: str) -> Variant:
        """Find a variant without reading its files. Raises `UnknownVariantError`."""
        if name in self.bases:
            return self.bases[name]
        variant = self._variants.get(name)
        if variant is None and self._roots.exists(name):
            variant = self._variants[name] = Variant(name, Record(source=name))
        if variant is None or variant.record.hidden:
            available = self._with_names(self._listing.latest)
            more = f" and {len(available) - _SHOWN} more" if len(available) > _SHOWN else ""
            some = ", ".join(available[:_SHOWN]) + more
            raise UnknownVariantError(f"there is no variant {shown(name)}; the available variants are {some}")
        return variant

    def answering(self, asked: str, session: str | None) -> str:
        """The name whose version answers a request: another one than was asked for while a release is open.

        Args:
            asked: in the request; it need not exist.
            session: see `Release.draws`.
        """
        variant = self._variants.get(asked.removesuffix(CURRENT))
        release = variant.record.release if variant is not None else None
        if variant is None or release is None or not release.is_open:
            return asked
        is_drawn = asked == variant.name and release.draws(session)
        return staged_name(variant.name) if is_drawn else variant.name

    def has(self, name: str) -> bool:
        """Whether a request can use a name. Reads no files but those of this name."""
        try:
            self.find(name)
        except UnknownVariantError:
            return False
        return True

    def name_of(self, digest: str) -> str | None:
        """A name that refers to a version, if there is one."""
        known = [*self.bases.values(), *self._variants.values()]
        return next((v.name for v in known if v.version is not None and v.version.digest == digest), None)

    def names_by_digest(self) -> dict[str, list[str]]:
        """Every name that refers to a version, by its digest: a version can have several."""
        found: dict[str, list[str]] = {}
        for variant in (*self.bases.values(), *self._variants.values()):
            if variant.version is not None:
                found.setdefault(variant.version.digest, []).append(variant.name)
        return found

    def kind_of(self, variant: Variant) -> VariantKind:
        """How a variant is stored and served; judged by its files if it was not requested yet.

        For files that were not there when the names were listed last, that is a guess: to judge reads all of θ.
        """
        if variant.version is not None:
            return variant.version.kind
        if (listed := self._listing.kind(variant.record.source)) is not None:
            return listed
        try:
            source = self._roots.find(variant.record.source)
        except OptionError:  # the name is in two folders
            source = None
        is_merged = source is not None and isinstance(source.spec, Path) and looks_merged(source.spec)
        return VariantKind.CHECKPOINT if is_merged else VariantKind.ADAPTER

    def register(self, name: str, source: str) -> Variant:
        """Add a name for an entry of the roots. Raises `VariantNameError`, `VariantError`."""
        is_hidden = name in self._variants and self._variants[name].record.hidden
        taken = name in self.bases or (name in self._variants and not is_hidden)
        if taken or (self._roots.find(name) is not None and not (is_hidden and name == source)):
            raise VariantNameError(f"there is already a variant {shown(name)}; choose another name")
        if not self._roots.is_name(name):
            raise VariantNameError(
                f"{shown(name)} is not a valid name; use letters, digits, '.', '_' and '-', at most 128"
            )
        if self._roots.find(source) is None:
            raise VariantError(f"{shown(source)} is neither in the folders of variants nor an allowed Hub id")
        variant = Variant(name, Record(source=source))
        self._save({name: variant.record})
        self._variants[name] = variant
        return variant

    def unregister(self, name: str) -> None:
        """Remove a name. Raises `UnknownVariantError`, and `VariantNameError` for the base."""
        variant = self._unreleased(name)
        if self._roots.find(name) is None:
            self._save({name: None})
            del self._variants[name]
        else:  # otherwise it would be found in the roots again
            hidden = Record(source=variant.record.source, hidden=True)
            self._save({name: hidden})
            self._variants[name] = Variant(name, hidden)

    def pin(self, name: str, pinned: bool) -> Variant:
        """Record whether the weights of a variant are kept in host memory. Raises `UnknownVariantError`."""
        variant = self._own(name)
        pinning = variant.record.model_copy(update={"pinned": pinned})
        self._save({name: pinning})
        variant.record = pinning
        return variant

    def remember_active(self, name: str) -> None:
        """Record which variant an operator activated last."""
        self._save({}, active=name)

    def _own(self, name: str) -> Variant:
        variant = self.find(name)
        if name in self.bases:
            raise VariantNameError(f"{name} is the base model, which cannot be changed")
        return variant

    def _unreleased(self, name: str) -> Variant:
        variant = self._own(name)
        if name.endswith(STAGED):
            raise VariantNameError(f"{name} is a staged version, which only peanut-serve ctl release changes")
        if variant.record.release is not None and variant.record.release.is_open:
            raise VariantInUseError(
                f"{name} has a release of version {variant.record.release.digest[:12]}; promote it or roll it back "
                "first, with peanut-serve ctl release"
            )
        return variant

    def commit(self, changed: Mapping[str, Record | None], versions: Mapping[str, Version] = _NONE) -> None:
        """Change several names at once; None removes one. Nothing is changed if the records cannot be written.

        Args:
            changed: name -> its new record.
            versions: name -> the version it refers to from now on; prepared, and with the digest of the record.
        """
        self._save(changed)
        for name, record in changed.items():
            if record is None:
                self._variants.pop(name, None)
                continue
            variant = self._variants.setdefault(name, Variant(name, record))
            variant.record = record
            if name in versions:
                variant.version, variant.error = versions[name], None

    def _save(self, changed: Mapping[str, Record | None], **others: str) -> None:
        """Save changed records; None removes one. Memory is updated only after the records are on disk."""
        old = self.records.variants
        variants = {name: record for name, record in {**old, **changed}.items() if record is not None}
        records = self.records.model_copy(update={"variants": variants, **others})
        self._store.save(records)
        self.records = records
        self._store.forget(all_digests(old) - all_digests(variants))
