"""The requests of tenants: who sends one, whether there is room for it, and what it may use."""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from converters.errors import PeanutError
from peanut_serve.errors import (
    ForbiddenError,
    ServingError,
    TenantLimitError,
    UnauthorizedError,
    UnknownVariantError,
    shown,
)
from peanut_serve.tenants.keys import OTHERS, Key, Role
from peanut_serve.tenants.usage import REFUSED, USAGE, Used, forget_refusals
from peanut_serve.tenants.watched import WatchedKeys

FRONT = "PEANUT_BEHIND_FRONT"  # the environment variable of an engine whose clients are those of a fleet's front
TENANT_HEADER = b"x-peanut-tenant"  # by which the front tells such an engine whose request it is
_MINUTE = 60.0
_GRACE_SECONDS, _LOOKS = 0.1, 10  # for a place: a client has its answer a moment before the request has ended


@dataclass
class _Load:
    """What a tenant takes now.

    Attributes:
        inside: its requests in the server.
        waiting: those of them that the engine has not admitted.
        inputs: those of its requests, where one has several that wait each for itself.
        allowance: how many it may send at once; it grows evenly, up to the requests of a minute.
        at: when that was true.
        is_gone: whether the tenant is no longer in the keys file.
    """

    inside: int = 0
    waiting: int = 0
    inputs: int = 0
    allowance: float = math.inf
    at: float = 0.0
    is_gone: bool = False

    def grow(self, per_minute: int, now: float) -> None:
        """Let the allowance grow until now."""
        self.allowance = min(per_minute, self.allowance + (now - self.at) * per_minute / _MINUTE)
        self.at = now

    def seconds_until_next(self, per_minute: int, now: float) -> float:
        """Take one request from the allowance, which gives 0; or the seconds until there is one."""
        self.grow(per_minute, now)
        if self.allowance < 1:
            return (1 - self.allowance) * _MINUTE / per_minute
        self.allowance -= 1
        return 0.0


class Visit:
    """A request, from its arrival to its end; leave it by `with`.

    Args:
        key: of the tenant; None for clients that are not in a keys file, who have no limits of their own.
        load: of the tenant.
        clock: seconds that only grow.
        label: the name in labels of a client without a key of the file.
    """

    def __init__(
        self,
        key: Key | None = None,
        load: _Load | None = None,
        clock: Callable[[], float] = time.monotonic,
        label: str = OTHERS,
    ) -> None:
        self._key, self._load, self._clock, self._label = key, load or _Load(), clock, label
        self._admitted_at: float | None = None
        self._load.inside += 1
        self._load.waiting += 1

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self._load.inside -= 1
        if self._admitted_at is None:
            self._load.waiting -= 1

    @property
    def tenant(self) -> str:
        """The name in labels."""
        if self._key is None:
            return self._label
        return OTHERS if self._load.is_gone else self._key.name

    @property
    def is_tenant(self) -> bool:
        """Whether the request has a key of the file."""
        return self._key is not None

    @property
    def is_restricted(self) -> bool:
        """Whether there may be variants that it may not use."""
        return self._key is not None and self._key.is_restricted

    def rate_headers(self) -> list[tuple[bytes, bytes]]:
        """What its tenant may send, in the headers of OpenAI's API; none without a limit."""
        return _rate_headers(self._key, self._load, self._clock())

    def may_use(self, variant: str) -> bool:
        """Whether it may use a variant."""
        return self._key is None or self._key.may_use(variant)

    def check(self, variant: str) -> None:
        """Raise `ForbiddenError` if it may not use a variant, whether there is one of this name or not."""
        if not self.may_use(variant):
            raise refused(
                self.tenant, "variant", ForbiddenError(f"the key of {self.tenant} may not use {shown(variant)}")
            )

    def forbid(self, what: str) -> ServingError:
        """The refusal of something that no tenant may do."""
        return refused(self.tenant, "route", ForbiddenError(f"the key of {self.tenant} may not use {what}"))

    def without_names(self, error: PeanutError, variant: str, kind: str = "variant") -> PeanutError:
        """An error without the names of variants that this tenant may not use; `kind` says what they are names of."""
        if self.is_restricted and isinstance(error, UnknownVariantError):
            return UnknownVariantError(f"there is no {kind} {shown(variant)}")
        return error

    def take_inputs(self, count: int, most: int) -> Callable[[], None]:
        """See `take_inputs`."""
        load = self._load
        if self._key is not None and load.inputs and load.inputs + count > most // 2:
            message = (
                f"{load.inputs} inputs of {self.tenant} wait; with {count} more they are over half of all places"
            )
            raise refused(self.tenant, "places", TenantLimitError(f"{message}; send them when these are answered"))
        load.inputs += count

        def give_back() -> None:
            load.inputs -= count

        return give_back

    def admit(self) -> None:
        """The engine works on it from now on."""
        if self._admitted_at is None:
            self._admitted_at = self._clock()
            self._load.waiting -= 1

    def count(self, variant: str) -> None:
        """Add it to what its tenant has used of a variant of the catalogue, if it was admitted."""
        if self._admitted_at is not None:
            used = Used(requests=1, engine_seconds=self._clock() - self._admitted_at)
            USAGE.add(variant, self.tenant, used)


# of the request that is being handled; every request has its own context
current_visit: ContextVar[Visit | None] = ContextVar("current_visit", default=None)


def current_tenant() -> str:
    """The tenant whose request is being handled, as in labels."""
    visit = current_visit.get()
    return OTHERS if visit is None else visit.tenant


def may_use(variant: str) -> bool:
    """Whether the request that is being handled may use a variant."""
    visit = current_visit.get()
    return visit is None or visit.may_use(variant)


def take_inputs(count: int, most: int) -> Callable[[], None]:
    """Take places for the inputs of the request that is being handled; call what is returned when they are answered.

    Args:
        count: how many inputs it has.
        most: how many of all may wait; one tenant gets at most half of these places, or those of one request.

    Raises `TenantLimitError`.
    """
    visit = current_visit.get()
    return (lambda: None) if visit is None else visit.take_inputs(count, most)


def _rate_headers(key: Key | None, load: _Load, now: float) -> list[tuple[bytes, bytes]]:
    if key is None or key.requests_per_minute is None:
        return []
    limit = key.requests_per_minute
    load.grow(limit, now)
    told = {
        "limit": str(limit),
        "remaining": str(int(load.allowance)),
        "reset": f"{(limit - load.allowance) * _MINUTE / limit:.3g}s",  # until all of them are there again
    }
    return [(f"x-ratelimit-{name}-requests".encode(), value.encode()) for name, value in told.items()]


def refused(tenant: str, reason: str, error: ServingError) -> ServingError:
    """Count a refusal, and return it."""
    REFUSED.labels(tenant, reason).inc()
    return error


class Tenants:
    """Lets in the requests of the tenants of a keys file. For one event loop.

    Args:
        keys: of the file.
        most_waiting: how many requests of all may wait; one tenant gets at most half of these places.
        clock: seconds that only grow.
    """

    def __init__(self, keys: WatchedKeys, most_waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._watched, self._clock = keys, clock
        self.limit(most_waiting)
        self._loads: dict[str, _Load] = {}
        self._known: Mapping[bytes, Key] = keys.keys

    def limit(self, most_waiting: int) -> None:
        """Let another number of requests wait."""
        self._most_waiting = max(1, most_waiting // 2)

    async def enter(self, token: bytes) -> Visit:
        """Begin a request with a key.

        Raises:
            UnauthorizedError: the key is not in the file.
            ForbiddenError: it is one of operators.
            TenantLimitError: its tenant has sent too many requests, or has too many in the server.
        """
        key = self._watched.find(token)
        self._forget_gone()
        if key is None:
            raise UnauthorizedError("the API key is missing or wrong; send it as Authorization: Bearer KEY")
        if key.role is not Role.DATA:
            message = f"the key of {key.name} has the role {key.role.value}; requests for variants need one of data"
            raise refused(key.name, "role", ForbiddenError(message))
        load = self._loads.setdefault(key.name, _Load(at=self._clock()))
        for _ in range(_LOOKS):
            if key.places is None or load.inside < key.places:
                break
            await asyncio.sleep(_GRACE_SECONDS / _LOOKS)
        self._check_places(key, load)
        self._check_rate(key, load)
        return Visit(key, load, self._clock)

    def _check_places(self, key: Key, load: _Load) -> None:
        if key.places is not None and load.inside >= key.places:
            message = f"{key.name} has {load.inside} requests in the server, and may have {key.places}"
        elif load.waiting >= self._most_waiting:
            message = f"{load.waiting} requests of {key.name} wait, which is half of all places"
        else:
            return
        headers = _rate_headers(key, load, self._clock())
        message = f"{message}; send more when they are answered"
        raise refused(key.name, "places", TenantLimitError(message, 1, headers))

    def _check_rate(self, key: Key, load: _Load) -> None:
        if key.requests_per_minute is None:
            return
        wait = load.seconds_until_next(key.requests_per_minute, self._clock())
        if wait > 0:
            message = f"{key.name} may send {key.requests_per_minute} requests a minute, and has sent more"
            headers = _rate_headers(key, load, self._clock())
            raise refused(key.name, "rate", TenantLimitError(message, math.ceil(wait), headers))

    def _forget_gone(self) -> None:
        """Forget tenants that are no longer in the file. Their requests in the server go on."""
        if self._known is (now := self._watched.keys):
            return
        names = {key.name for key in now.values()}
        for gone in {key.name for key in self._known.values()} - names:
            if (load := self._loads.pop(gone, None)) is not None:
                load.is_gone = True
            USAGE.forget_tenant(gone)
            forget_refusals(gone)
        self._known = now
