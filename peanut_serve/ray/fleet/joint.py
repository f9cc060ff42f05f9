"""What the replicas say, as one answer: what is true of the whole fleet, and what differs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from peanut_serve.errors import UnknownVariantError, VariantError, shown
from peanut_serve.web.fleet_schema import (
    FleetChange,
    FleetEngineStatus,
    FleetEntry,
    FleetVariantStatus,
    ReplicaEngine,
    ReplicaVariant,
)
from peanut_serve.web.schema import EngineStatus, VariantState, VariantStatus

Entry = Mapping[str, Any]

_STATES = (  # the first that a replica has is that of the fleet
    VariantState.FAILED,
    VariantState.PREPARING,
    VariantState.ACTIVE,
    VariantState.READY,
    VariantState.REGISTERED,
)
_ENGINE_STATES: tuple[Literal["failed", "restarting", "swapping", "serving"], ...] = (
    "failed",
    "restarting",
    "swapping",
    "serving",
)


def joint_change(entries: Sequence[Entry]) -> FleetChange:
    """The result of a change that went to all replicas."""
    replicas = [FleetEntry.model_validate(entry) for entry in entries]
    digests = {entry.replica: entry.digest for entry in replicas if entry.digest}
    refusals = [f"{_name(entry.replica)}: {entry.reason}" for entry in replicas if not entry.is_done]
    message = ""
    if refusals:
        message = f"{len(refusals)} of {len(replicas)} replicas did not make the change: {'; '.join(refusals)}"
    elif len(set(digests.values())) > 1:
        message = f"the replicas have different versions now: {_versions(digests)}"
    return FleetChange(agree=bool(replicas) and not message, message=message, replicas=replicas)


def joint_variants(entries: Sequence[Entry]) -> list[FleetVariantStatus]:
    """All variants, the base's first as each replica lists them.

    Args:
        entries: of each replica, its variants as `answer`, and as `withheld` why it refuses requests, by name.
    """
    listed = [_by_name(entry.get("answer")) for entry in entries]
    names = dict.fromkeys(name for variants in listed for name in variants)
    ordered = sorted(names, key=lambda name: next(v[name].kind != "base" for v in listed if name in v))
    withheld = {name for entry in entries for name in entry.get("withheld", {})} - set(names)
    found = [_joint_variant(name, entries, listed) for name in ordered]
    return found + [_missing(name, entries) for name in sorted(withheld)]


def _joint_variant(name: str, entries: Sequence[Entry], listed: Sequence[Mapping[str, VariantStatus]]) -> Any:
    replicas = [
        ReplicaVariant(
            replica=entry["replica"],
            status=variants.get(name),
            withheld=entry.get("withheld", {}).get(name),
            error=None if name in variants else entry.get("error") or "the replica does not have it",
        )
        for entry, variants in zip(entries, listed, strict=True)
    ]
    all_found = [one.status for one in replicas if one.status is not None]
    message = _difference(replicas)
    digests = {one.digest for one in all_found} - {None}
    used = [one.last_used for one in all_found if one.last_used is not None]
    swapped = [one.last_swap_seconds for one in all_found if one.last_swap_seconds is not None]
    first = all_found[0]
    return FleetVariantStatus(
        name=name,
        kind=max(all_found, key=lambda one: one.requests).kind,  # which it judged by the files before the first one
        state=next(state for state in _STATES if any(one.state is state for one in all_found)),
        digest=digests.pop() if len(digests) == 1 else None,
        previous=list(dict.fromkeys(digest for one in all_found for digest in one.previous)),
        source=first.source,
        host_bytes=sum(one.host_bytes for one in all_found),
        evictable_bytes=sum(one.evictable_bytes for one in all_found),
        pinned=all(one.pinned for one in all_found),
        held=all(one.held for one in all_found),
        running=sum(one.running for one in all_found),
        waiting=sum(one.waiting for one in all_found),
        requests=sum(one.requests for one in all_found),
        last_used=max(used, default=None),
        swaps=sum(one.swaps for one in all_found),
        last_swap_seconds=max(swapped, default=None),
        error=next((one.error for one in all_found if one.error), None),
        agree=not message,
        message=message,
        replicas=replicas,
    )


def _missing(name: str, entries: Sequence[Entry]) -> FleetVariantStatus:
    """A variant that no replica has, though it is wanted."""
    reasons = {entry["replica"]: entry.get("withheld", {}).get(name) for entry in entries}
    replicas = [
        ReplicaVariant(replica=replica, status=None, withheld=reason, error="the replica does not have it")
        for replica, reason in reasons.items()
    ]
    return FleetVariantStatus(
        name=name,
        kind="adapter",
        state=VariantState.FAILED,
        digest=None,
        previous=[],
        source="",
        host_bytes=0,
        evictable_bytes=0,
        pinned=False,
        running=0,
        waiting=0,
        requests=0,
        last_used=None,
        swaps=0,
        last_swap_seconds=None,
        error=next(reason for reason in reasons.values() if reason),
        agree=False,
        message=_difference(replicas),
        replicas=replicas,
    )


def _difference(replicas: Sequence[ReplicaVariant]) -> str:
    withheld = [f"{_name(one.replica)} refuses requests ({one.withheld})" for one in replicas if one.withheld]
    missing = [
        f"{_name(one.replica)} has no status ({one.error})"
        for one in replicas
        if one.status is None and not one.withheld
    ]
    digests = {one.replica: one.status.digest for one in replicas if one.status is not None and one.status.digest}
    differs = [f"versions differ: {_versions(digests)}"] if len(set(digests.values())) > 1 else []
    pins = {one.status.pinned for one in replicas if one.status is not None}
    holds = {one.status.held for one in replicas if one.status is not None}
    flags = [f"some {what} it, others do not" for what, found in (("pin", pins), ("hold", holds)) if len(found) > 1]
    return "; ".join([*differs, *withheld, *missing, *flags])


def joint_engine(entries: Sequence[Entry]) -> FleetEngineStatus:
    """The engines of all replicas. Raises `LookupError` if none answered."""
    replicas = []
    for entry in entries:
        engine = _model(EngineStatus, entry.get("answer")) if entry["status"] == 200 else None
        error = None if engine else entry.get("error") or f"the engine answered {entry['status']}"
        replicas.append(ReplicaEngine(replica=entry["replica"], engine=engine, error=error))
    engines = [one.engine for one in replicas if one.engine is not None]
    if not engines:
        raise LookupError("no engine answered")
    digests = {one.digest for one in engines}
    silent = [f"{_name(one.replica)} did not answer ({one.error})" for one in replicas if one.engine is None]
    return FleetEngineStatus(
        state=next(state for state in _ENGINE_STATES if any(one.state == state for one in engines)),
        active=", ".join(sorted({one.active for one in engines})),
        digest=digests.pop() if len(digests) == 1 else "",
        restarts=sum(one.restarts for one in engines),
        host_cache_bytes=sum(one.host_cache_bytes for one in engines),
        host_cache_limit=sum(one.host_cache_limit for one in engines),
        base_copy_bytes=sum(one.base_copy_bytes for one in engines),
        kv_cache_usage=max((one.kv_cache_usage for one in engines if one.kv_cache_usage is not None), default=None),
        swap_seconds={},
        detail="; ".join(sorted({one.detail for one in engines if one.detail})) or None,
        agree=not silent,
        message="; ".join(silent),
        replicas=replicas,
    )


def rollback_target(name: str, statuses: Iterable[VariantStatus], asked: str | None) -> str:
    """The digest that all replicas are to go back to.

    Args:
        name: of the variant.
        statuses: of the variant at each replica that has it.
        asked: a digest, or a prefix of one; by default, the version that the replicas had before.

    Raises `UnknownVariantError` without statuses, and `VariantError` if there is no such version, or several.
    """
    chains = [[*([one.digest] if one.digest else []), *one.previous] for one in statuses]
    earlier = {one.previous[0] for one in statuses if one.previous}
    known = {digest for chain in chains for digest in chain}
    if not chains:
        raise UnknownVariantError(f"no replica has a variant {shown(name)}")
    if asked is not None:
        found = {asked} if len(asked) == 40 else {digest for digest in known if digest.startswith(asked)}
    else:  # what one replica had before may be older than what another one had
        found = {one for one in earlier if not any(_is_older(one, other, chains) for other in earlier)}
    if len(found) == 1:
        return found.pop()
    listed = ", ".join(sorted(digest[:12] for digest in (found or known))) or "none"
    if not found:
        raise VariantError(f"{name} has no such earlier version; its versions are {listed}")
    raise VariantError(f"several versions of {name} may be meant: {listed}; give the digest of one")


def _is_older(one: str, other: str, chains: Iterable[Sequence[str]]) -> bool:
    return any(one in chain and other in chain and chain.index(one) > chain.index(other) for chain in chains)


def _by_name(answer: Any) -> dict[str, VariantStatus]:
    found = [_model(VariantStatus, one) for one in answer] if isinstance(answer, list) else []
    return {one.name: one for one in found if one is not None}


def _model(kind: Any, value: Any) -> Any:
    try:
        return kind.model_validate(value)
    except ValidationError:
        return None


def _versions(digests: Mapping[str | None, str]) -> str:
    return ", ".join(f"{_name(replica)} has {digest[:12]}" for replica, digest in digests.items())


def _name(replica: str | None) -> str:
    return replica or "a lost replica"
