"""Snapshots of a server, for monitoring and for operators."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from peanut_serve.swapping.driver import State
from peanut_serve.variants.version import VariantKind


class Availability(str, Enum):
    """How soon a request for a variant can run."""

    REGISTERED = "registered"  # its weights have to be evaluated first
    READY = "ready"  # after a swap
    ACTIVE = "active"  # immediately
    FAILED = "failed"  # its preparation or its last swap failed


@dataclass(frozen=True)
class VariantFacts:
    """A variant at one moment.

    Attributes:
        name: the name in requests.
        kind: how it is stored and served.
        availability: how soon a request for it can run.
        digest: of its version; None until it is known.
        previous: digests of earlier versions, newest first.
        source: entry of the folders of variants, or Hub id.
        host_bytes: size of its weights in host memory.
        evictable_bytes: what evicting them would free; none while they are pinned or in use.
        is_pinned: whether its weights are kept in host memory.
        is_held: whether a rollback holds its version until it is reloaded.
        running: requests in the engine.
        waiting: requests waiting for its weights.
        requests: requests admitted so far.
        last_used: seconds since the epoch; None before the first request.
        swaps: swaps to it so far.
        last_swap_seconds: duration of the last one.
        error: why its last preparation or swap failed.
    """

    name: str
    kind: VariantKind
    availability: Availability
    digest: str | None
    previous: tuple[str, ...]
    source: str
    host_bytes: int
    evictable_bytes: int
    is_pinned: bool
    is_held: bool
    running: int
    waiting: int
    requests: int
    last_used: float | None
    swaps: int
    last_swap_seconds: float | None
    error: str | None


@dataclass(frozen=True)
class EngineFacts:
    """The engine at one moment.

    Attributes:
        state: what it is doing.
        detail: reason for the state, if there is one.
        active: name of the variant whose weights it has.
        digest: identity of these weights.
        restarts: how often it was restarted.
        host_cache_bytes: size of all evaluated weights in host memory.
        host_cache_limit: the limit of that size.
        base_copy_bytes: size of the copies of the base, in host memory or on the devices.
        swap_seconds: duration of each phase of the last swap.
    """

    state: State
    detail: str | None
    active: str
    digest: str
    restarts: int
    host_cache_bytes: int
    host_cache_limit: int
    base_copy_bytes: int
    swap_seconds: Mapping[str, float]
