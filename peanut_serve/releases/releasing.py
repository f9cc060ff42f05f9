"""Stages versions, divides the requests of a name between two of them, and ends releases. For one event loop."""

import asyncio
import logging
from collections.abc import Callable

from converters.serving import find_adapter
from peanut_serve.errors import BeingWrittenError, ReleaseError, VariantError
from peanut_serve.releases.book import ReleaseBook
from peanut_serve.releases.canary_set import CanarySet, read_canary_set
from peanut_serve.releases.checking import Route, ask_all
from peanut_serve.releases.rules import check_passed, noted, too_many_failed
from peanut_serve.settings.versions import CURRENT, STAGED, released_name, staged_name
from peanut_serve.swapping.server import VariantServer
from peanut_serve.variants.catalogue import Variant, moved_to
from peanut_serve.variants.release import Release
from peanut_serve.variants.roots import State, VariantSource
from peanut_serve.variants.state_folder import Record
from peanut_serve.variants.version import Version

logger = logging.getLogger("vllm.peanut_serve")

# told of a release that was ended without an operator: the name, the release before, and the reason
Ended = Callable[[str, Release, str], None]


class Releases:
    """The releases of a server.

    Args:
        server: it.
        route: its route for completions, which canary sets are asked by.
        ended: told of releases that failures have ended.

    Attributes:
        book: the releases that are recorded.
    """

    def __init__(self, server: VariantServer, route: Route, ended: Ended) -> None:
        self._server, self._catalogue, self._route, self._ended = server, server.catalogue, route, ended
        self.book = ReleaseBook(server.catalogue)
        server.watch = self._watch

    async def hold(self, name: str) -> None:
        """Keep a name at its version, whatever happens to its files, until it is reloaded.

        Raises `UnknownVariantError`, and what preparing the version raises.
        """
        variant = self.book.changeable(name)
        await self._server.prepare(name)
        async with variant.lock:
            if not self.book.changeable(name).record.held:
                self._catalogue.commit({name: variant.record.model_copy(update={"held": True})})

    async def stage(self, name: str, source: str | None = None, digest: str | None = None) -> None:
        """Stage the version that is in the files, and ask it its canary set. The name is held from now on.

        Args:
            name: of a variant.
            source: another entry of the roots to take the version from.
            digest: of the version that is expected. If the files have another one, it is taken from the state folder,
                without a canary set.

        Raises `UnknownVariantError`, `ReleaseError` if a release is open, and `VariantError` if the version cannot be
        served, or is the one that the name has.
        """
        variant = self.book.beginning(name)
        if variant.record.digest is None:
            await self._server.prepare(name)  # or there would be nothing to hold
        entry = source or variant.record.source
        found, state = await asyncio.to_thread(self._catalogue.reader.look, entry, entry)
        async with variant.lock:  # a request may be moving the name
            if not self.book.beginning(name).record.held:
                self._catalogue.commit({name: variant.record.model_copy(update={"held": True})})
        version, state, canaries = await self._read(staged_name(name), found, state, digest)
        self._check_is_new(variant, version, entry)
        await self._server.make_ready(staged_name(name), version)
        async with variant.lock:
            if self.book.beginning(name) is not variant:
                raise ReleaseError(f"{name} was removed while a version of it was staged")
            self._check_is_new(variant, version, entry)
            self._stage(
                variant, Record(source=entry, digest=version.digest, seen=state, held=True), version, canaries
            )
        if canaries is not None:
            await self.check(name)

    def _stage(self, variant: Variant, staged: Record, version: Version, canaries: CanarySet | None) -> None:
        record, events = variant.record, variant.record.release.events if variant.record.release else []
        release = Release(
            digest=version.digest,
            source=staged.source,
            replaces=record.digest or "",
            replaces_source=record.source,
            canary=canaries.model_dump(exclude_defaults=True) if canaries is not None else None,
            events=events,
        )
        begun = noted(release, "stage", f"from {staged.source}")
        released = record.model_copy(update={"release": begun, "held": True})  # also after a reload meanwhile
        name = staged_name(variant.name)
        self._catalogue.commit({variant.name: released, name: staged}, {name: version})
        self.book.forget_counts(variant.name)
        logger.info("variant=%s digest=%s staged from %s", variant.name, version.digest[:12], staged.source)

    async def _read(
        self, name: str, source: VariantSource, state: State, digest: str | None
    ) -> tuple[Version, State, CanarySet | None]:
        """A version and the canary set beside it, from files that do not change meanwhile."""
        version, state = await self._catalogue.reader.read(name, source, state)
        if digest not in (None, version.digest):
            kept = await asyncio.to_thread(self._catalogue.reader.reopen, name, source, str(digest))
            if kept is None:
                raise VariantError(
                    f"the files of {source.name} have version {version.digest[:12]}, expected {str(digest)[:12]}; "
                    "put the files of that version there, or stage it without its digest"
                )
            return kept, state, None
        canaries = await asyncio.to_thread(_canaries, source)
        if await asyncio.to_thread(source.state) != state:
            raise BeingWrittenError(f"the files of {source.name} are being written; try again when they are complete")
        return version, state, canaries

    @staticmethod
    def _check_is_new(variant: Variant, version: Version, entry: str) -> None:
        if version.digest == variant.record.digest:
            raise VariantError(
                f"the files of {entry} have the version {version.digest[:12]} that {variant.name} has now; replace "
                "them, or give another source"
            )

    async def check(self, name: str) -> None:
        """Ask the staged version its canary set, and record the answers.

        Raises `ReleaseError` if no release is open, it has no canary set, or it ends meanwhile.
        """
        release = self.book.open_one(name)
        if release.canary is None:
            raise ReleaseError(f"there was no canary.json beside version {release.digest[:12]} when it was staged")
        canaries, staged = CanarySet.model_validate(release.canary), (staged_name(name), release.digest)
        answers = await ask_all(self._route, canaries, staged, name + CURRENT)
        now = self.book.open_one(name)
        if now.digest != release.digest:
            raise ReleaseError(f"the release of {name} has ended while it was checked")
        failed = sum(bool(one.problems) for one in answers)
        told = f"{failed} of {len(answers)} failed" if failed else f"all {len(answers)} passed"
        self.book.update(name, now, "check", told, answers=answers)

    def weigh(self, name: str, weight: int, max_error_rate: float, min_requests: int, is_forced: bool) -> None:
        """Give the staged version a share of the requests, from which failures are counted anew.

        Args:
            name: of the variant.
            weight: percentage.
            max_error_rate: share of failures above which the release is rolled back.
            min_requests: number of requests before which it is not.
            is_forced: although it has not passed its canary set.

        Raises `ReleaseError` if no release is open, or it has not passed.
        """
        release = self.book.open_one(name)
        if weight and not is_forced:
            check_passed(name, release)
        rules = {"weight": weight, "max_error_rate": max_error_rate, "min_requests": min_requests}
        self.book.update(name, release, "weight", f"{weight} %{', forced' if is_forced else ''}", **rules)
        self.book.forget_counts(name)

    async def promote(self, name: str, is_forced: bool) -> None:
        """Move a name to its staged version.

        Raises `ReleaseError` if no release is open, or it has not passed its canary set and is not forced, and what
        preparing the version raises.
        """
        release = self.book.open_one(name)
        if not is_forced:
            check_passed(name, release)
        version = await self._server.prepare(staged_name(name))
        variant = self._catalogue.find(name)
        async with variant.lock:
            now = self.book.open_one(name)
            if now.digest != version.digest:
                raise ReleaseError(f"the release of {name} has ended while it was promoted")
            detail = f"from {now.replaces[:12]}{', forced' if is_forced else ''}"
            promoted = noted(now, "promote", detail, state="promoted", weight=0, canary=None)
            record = moved_to(variant.record, version.digest, source=now.source, held=True, release=promoted)
            self._catalogue.commit({name: record, staged_name(name): None}, {name: version})
        self._forget_staged(name)
        logger.info("variant=%s digest=%s promoted", name, version.digest[:12])

    async def rollback(self, name: str, reason: str | None = None) -> None:
        """End an open release; or move a name back from the version that was promoted. The name stays held.

        Raises `ReleaseError` if the name has moved since the promotion, and `VariantError` if the version before
        is not available any more.
        """
        release = self.book.find(name)
        if release.is_open:
            self._end(name, release, reason)
            return
        variant = self.book.changeable(name)
        async with variant.lock:
            now = self.book.find(name)
            if now.state != "promoted" or variant.record.digest != now.digest:
                raise ReleaseError(
                    f"{name} has no version that a release gave it; peanut-serve ctl rollback {name} returns to "
                    "earlier ones"
                )
            source, _ = await asyncio.to_thread(self._catalogue.reader.look, name, now.replaces_source)
            version = await asyncio.to_thread(self._catalogue.reader.reopen, name, source, now.replaces)
            if version is None:
                raise VariantError(f"version {now.replaces[:12]} of {name} is no longer available")
            await self._server.make_ready(name, version)
            rolled = noted(now, "rollback", reason, state="rolled_back")
            record = moved_to(variant.record, version.digest, source=now.replaces_source, held=True, release=rolled)
            self.book.changeable(name)  # it may have been removed
            self._catalogue.commit({name: record}, {name: version})
        self._server.update_pin(name)
        logger.info("variant=%s digest=%s rolled back to", name, version.digest[:12])

    def _end(self, name: str, release: Release, reason: str | None) -> None:
        rolled = noted(release, "rollback", reason, state="rolled_back", weight=0, canary=None)
        record = self._catalogue.find(name).record.model_copy(update={"release": rolled})
        self._catalogue.commit({name: record, staged_name(name): None})
        self._forget_staged(name)
        logger.warning("variant=%s digest=%s release rolled back: %s", name, release.digest[:12], reason)

    def _forget_staged(self, name: str) -> None:
        self.book.forget_counts(name)
        self._server.update_pin(staged_name(name))
        self._server.update_pin(name)

    def _watch(self, name: str, digest: str | None, is_failure: bool) -> None:
        """Count a request of a staged version that has a share, and end its release if too many failed."""
        if not name.endswith(STAGED) or not self._catalogue.has(main := released_name(name)):
            return
        release = self._catalogue.find(main).record.release
        if release is None or not release.is_open or not release.weight or digest not in (None, release.digest):
            return
        self.book.count(main, release, is_failure)
        reason = too_many_failed(release, *self.book.counts(main))
        if reason is None:
            return
        try:
            self._end(main, release, reason)
        except OSError as error:  # the requests must not go there, whatever the disk says
            record = self._catalogue.find(main).record
            record.release = release.model_copy(update={"weight": 0})
            logger.error("the release of %s has no share any more, but that cannot be recorded: %s", main, error)
        self._ended(main, release, reason)


def _canaries(source: VariantSource) -> CanarySet | None:
    folder = find_adapter(source.spec).path if isinstance(source.spec, str) else source.spec
    return read_canary_set(folder)
