"""The releases that are recorded, and how many requests of its share failed."""

from collections import deque
from typing import Any

from peanut_serve.errors import UnknownVariantError, VariantNameError
from peanut_serve.releases.rules import check_none_open, check_open, noted
from peanut_serve.settings.versions import STAGED, released_name, staged_name
from peanut_serve.variants.catalogue import Catalogue, Variant
from peanut_serve.variants.release import Release

_WINDOW = 1000  # of the latest requests, in which failures are counted


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
        self._catalogue.commit(
            {name: record.model_copy(update={"release": noted(release, action, detail, **changed)})}
        )

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
