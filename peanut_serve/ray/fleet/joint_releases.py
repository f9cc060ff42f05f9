"""What the replicas have of a release, as one answer, and what of that forbids the next step."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from pydantic import ValidationError

from peanut_serve.errors import ReleaseError
from peanut_serve.releases.fleet_schema import FleetReleaseStatus, ReplicaRelease
from peanut_serve.releases.schema import EventStatus, ReleaseStatus
from peanut_serve.settings.versions import staged_name
from peanut_serve.variants.release import Release

Entry = Mapping[str, Any]


def joint_release(name: str, wanted: Release, entries: Sequence[Entry]) -> FleetReleaseStatus:
    """A release of a fleet.

    Args:
        name: of the variant.
        wanted: the release as operators want it.
        entries: of each replica, its releases as `answer`, and as `withheld` what it refuses, with the reasons.
    """
    replicas = [_replica(name, entry) for entry in entries]
    found = [one.status for one in replicas if one.status is not None and one.status.digest == wanted.digest]
    failing = next((one for one in found if one.passed is False), None)
    shown = failing or next((one for one in found if one.canary), None)
    message = "; ".join(_differences(wanted, replicas))
    return FleetReleaseStatus(
        name=name,
        state=wanted.state,
        digest=wanted.digest,
        source=wanted.source,
        replaces=wanted.replaces,
        weight=wanted.weight,
        max_error_rate=wanted.max_error_rate,
        min_requests=wanted.min_requests,
        watched=sum(one.watched for one in found),
        failed=sum(one.failed for one in found),
        passed=False if failing is not None else True if any(one.passed for one in found) else None,
        canary=shown.canary if shown is not None else [],
        events=[
            EventStatus(**{**one.model_dump(), "at": datetime.fromtimestamp(one.at, timezone.utc)})
            for one in wanted.events
        ],
        agree=not message,
        message=message,
        replicas=replicas,
    )


def _replica(name: str, entry: Entry) -> ReplicaRelease:
    answer = entry.get("answer")
    told = [_status(one) for one in answer] if isinstance(answer, list) and entry["status"] == 200 else []
    status = next((one for one in told if one is not None and one.name == name), None)
    withheld = entry.get("withheld", {})
    return ReplicaRelease(
        replica=entry["replica"],
        status=status,
        withheld=withheld.get(staged_name(name)) or withheld.get(name),
        error=None if status is not None else entry.get("error") or "the replica does not have it",
    )


def _status(answer: Any) -> ReleaseStatus | None:
    try:
        return ReleaseStatus.model_validate(answer)
    except ValidationError:
        return None


def _differences(wanted: Release, replicas: Sequence[ReplicaRelease]) -> list[str]:
    found = []
    for one in replicas:
        name, status = one.replica or "a lost replica", one.status
        if one.withheld:
            found.append(f"{name} does not have it ({one.withheld})")
        elif status is None and (wanted.is_open or one.replica is None):
            found.append(f"{name} does not have it ({one.error})")
        elif status is not None and status.state == "staged" and not wanted.is_open:
            found.append(f"{name} still has version {status.digest[:12]} staged")
        elif status is not None and wanted.is_open and status.digest != wanted.digest:
            found.append(f"{name} has version {status.digest[:12]}")
        elif status is not None and wanted.is_open and status.state != wanted.state:
            found.append(f"{name} has ended it ({status.events[-1].detail if status.events else status.state})")
        elif status is not None and wanted.is_open and status.weight != wanted.weight:
            found.append(f"{name} gives it {status.weight} %")
    return found


def check_joint_passed(release: FleetReleaseStatus) -> None:
    """Raise `ReleaseError` if a replica has not passed the canary set."""
    for one in release.replicas:
        status = one.status
        if status is None or status.digest != release.digest or status.passed is not False:
            continue
        failed = [answer for answer in status.canary if answer.problems]
        why = f"{failed[0].prompt[:40]!r}: {failed[0].problems[0]}" if failed else "it was not asked yet"
        raise ReleaseError(
            f"version {release.digest[:12]} of {release.name} has not passed its canary set at {one.replica} "
            f"({why}); check it again, roll it back, or force it"
        )


def check_everywhere(release: FleetReleaseStatus) -> None:
    """Raise `ReleaseError` if a replica that answers does not have the version."""
    for one in release.replicas:
        if one.replica is not None and (one.withheld or one.status is None or one.status.digest != release.digest):
            raise ReleaseError(
                f"{one.replica} does not have version {release.digest[:12]} of {release.name} "
                f"({one.withheld or one.error or 'it has another one'}); wait until it does, roll the release back, "
                "or force it"
            )


def failure_of(release: FleetReleaseStatus) -> str | None:
    """Why a replica has ended an open release because of failures, or why those of all of them end it."""
    for one in release.replicas:
        status = one.status
        if status is None or one.withheld or status.digest != release.digest or status.state != "rolled_back":
            continue
        return f"{one.replica}: {(status.events[-1].detail if status.events else None) or 'it was rolled back there'}"
    return None
