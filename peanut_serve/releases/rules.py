"""What a release allows: the same at a server and in a fleet."""

import time
from typing import Any

from peanut_serve.errors import ReleaseError
from peanut_serve.variants.release import Release, ReleaseEvent

_MOST_EVENTS = 20


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
            f"{name} has a release of version {release.digest[:12]}; promote it or roll it back before another "
            "is staged"
        )


def check_passed(name: str, release: Release) -> None:
    """Raise `ReleaseError` if a version has not passed its canary set."""
    if release.passed is not False:
        return
    failed = [one for one in release.answers or () if one.problems]
    why = f"{failed[0].prompt[:40]!r}: {failed[0].problems[0]}" if failed else "it was not asked yet"
    raise ReleaseError(
        f"version {release.digest[:12]} of {name} has not passed its canary set ({why}); check it again, roll it "
        "back, or force it"
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
