"""The releases that are recorded, what each of them allows now, and how many requests of its share failed."""

import time
from collections import deque
from typing import Any

from peanut_serve.errors import ReleaseError, UnknownVariantError, VariantNameError
from peanut_serve.settings.versions import STAGED, released_name, staged_name
from peanut_serve.variants.catalogue import Catalogue, Variant
from peanut_serve.variants.release import Release, ReleaseEvent

_WINDOW = 1000  # of the latest requests, in which failures are counted
_MOST_EVENTS = 20


class ReleaseBook:
    """The releases of a catalogue. For one event loop.

    Args:
        catalogue: it.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._outcomes: dict[str, deque[bool]] = {}  # name -> whether each of the latest requests failed

    def find(self, name: str) -> Release:
        """The latest release of a name. Raises `UnknownVariantError` if there is no such name, or it has none."""
        release = self._catalogue.find(name).record.release
        if release is None:
            raise UnknownVariantError(f"{name} has no release; stage a version of it")
        return release

    def names(self) -> list[str]:
        """The names that have a release, open or not."""
        records = self._catalogue.records.variants
        return sorted(name for name, record in records.items() if record.release is not None and not record.hidden)

    def open_one(self, name: str) -> Release:
        """The release of a name. Raises as `find`, and `ReleaseError` if it has ended."""
        release = self.find(name)
        check_open(name, release)
        return release

    def beginning(self, name: str) -> Variant:
        """A variant of which a version may be staged. Raises `ReleaseError` if a release is open."""
        variant = self.changeable(name)
        check_none_open(name, variant.record.release)
        if staged_name(name) in self._catalogue.bases:
            raise VariantNameError(f"the base has the name {staged_name(name)}; start the server with another one")
        return variant

    def changeable(self, name: str) -> Variant:
        """A variant that can have releases. Raises `UnknownVariantError`, `VariantNameError`."""
        variant = self._catalogue.find(name)
        if name in self._catalogue.bases:
            raise VariantNameError(f"{name} is the base model, which has no releases")
        if name.endswith(STAGED):
            raise VariantNameError(f"{name} is a staged version; release {released_name(name)}")
        return variant

    def update(self, name: str, release: Release, action: str, detail: str, **changed: Any) -> None:
        """Record a release that has changed."""
        record = self._catalogue.find(name).record
        self._catalogue.commit({name: record.model_copy(update={"release": noted(release, action, detail, **changed)})})

    def counts(self, name: str) -> tuple[int, int]:
        """How many of the requests that the staged version answered were watched, and how many of them failed."""
        outcomes = self._outcomes.get(name, deque())
        return len(outcomes), sum(outcomes)

    def count(self, name: str, release: Release, is_failure: bool) -> None:
        """Count a request that the staged version of a name has answered, or should have."""
        outcomes = self._outcomes.setdefault(name, deque(maxlen=max(_WINDOW, release.min_requests)))
        outcomes.append(is_failure)

    def forget_counts(self, name: str) -> None:
        """Count anew from now on."""
        self._outcomes.pop(name, None)


def check_open(name: str, release: Release) -> None:
    """Raise `ReleaseError` if a release has ended."""
    if not release.is_open:
        raise ReleaseError(
            f"the release of version {release.digest[:12]} of {name} was {release.state.replace('_', ' ')}; "
            "stage another version"
        )


def check_none_open(name: str, release: Release | None) -> None:
    """Raise `ReleaseError` if a name has an open release."""
    if release is not None and release.is_open:
        raise ReleaseError(
            f"{name} has a release of version {release.digest[:12]}; promote it or roll it back before another is staged"
        )


def check_passed(name: str, release: Release) -> None:
    """Raise `ReleaseError` if a version has not passed its canary set."""
    if release.passed is not False:
        return
    failed = [one for one in release.answers or () if one.problems]
    why = f"{failed[0].prompt[:40]!r}: {failed[0].problems[0]}" if failed else "it was not asked yet"
    raise ReleaseError(
        f"version {release.digest[:12]} of {name} has not passed its canary set ({why}); check it again, roll it back, "
        "or force it"
    )


def too_many_failed(release: Release, watched: int, failed: int) -> str | None:
    """Why so many failures end a release; None if they do not."""
    if watched < release.min_requests or failed <= release.max_error_rate * watched:
        return None
    return f"{failed} of the latest {watched} requests failed, at most {release.max_error_rate:.1%} may"


def noted(release: Release, action: str, detail: str | None, **changed: Any) -> Release:
    """A release after something has happened to it, which is among its events now."""
    event = ReleaseEvent(at=time.time(), action=action, digest=release.digest, detail=detail)
    return release.model_copy(update={**changed, "events": [*release.events, event][-_MOST_EVENTS:]})
