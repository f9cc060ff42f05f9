"""Who is logged in to the console, and how often somebody may try to be."""

import hashlib
import math
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from peanut_serve.web.operators import Operator, Operators

_IDLE_SECONDS = 30 * 60.0
_LONGEST_SECONDS = 12 * 3600.0
_MOST_SESSIONS = 64

_WINDOW_SECONDS = 60.0
_MOST_FAILURES = 5  # of one address in a window
_MOST_FAILURES_OF_ALL = 20


@dataclass
class Session:
    """A login.

    Attributes:
        number: counts the logins; for the log, as it gives nothing away.
        token: what the page has to send with every change, besides the cookie.
        opened, used: in seconds of the clock.
        operator: who logged in; renewed with each request.
    """

    number: int
    token: str
    opened: float
    used: float
    operator: Operator


class Sessions:
    """The logins, by a secret that only the browser has: here is its hash. The least recently used one makes room.

    Args:
        operators: whose keys open a session; it ends when the key is taken away.
        clock: seconds that only grow.
    """

    def __init__(self, operators: Operators, clock: Callable[[], float] = time.monotonic) -> None:
        self._operators, self._clock = operators, clock
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()
        self._count = 0

    def open(self, operator: Operator) -> str:
        """Begin a session; the secret for the cookie."""
        secret, now = secrets.token_urlsafe(32), self._clock()
        self._drop_expired(now)
        while len(self._sessions) >= _MOST_SESSIONS:
            self._sessions.popitem(last=False)
        self._count += 1
        self._sessions[_hash(secret)] = Session(self._count, secrets.token_urlsafe(32), now, now, operator)
        return secret

    def find(self, secret: str | None, is_use: bool = True) -> Session | None:
        """The session of a cookie, if it has not expired. It expires later for that, if this is a use by a person."""
        if secret is None:
            return None
        now = self._clock()
        self._drop_expired(now)
        if (session := self._sessions.get(key := _hash(secret))) is None:
            return None
        if (operator := self._operators.renewed(session.operator)) is None:
            del self._sessions[key]
            return None
        session.operator = operator
        if is_use:
            session.used = now
            self._sessions.move_to_end(key)
        return session

    def close(self, secret: str | None) -> None:
        """End a session."""
        if secret is not None:
            self._sessions.pop(_hash(secret), None)

    def _drop_expired(self, now: float) -> None:
        for key, session in list(self._sessions.items()):
            if now - session.used > _IDLE_SECONDS or now - session.opened > _LONGEST_SECONDS:
                del self._sessions[key]


class Attempts:
    """Failed logins of the last minute. While there are too many, the right key is not accepted either.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: deque[tuple[float, str]] = deque(maxlen=_MOST_FAILURES_OF_ALL)

    def wait(self, address: str) -> int:
        """Seconds until this address may try again; 0 if it may now."""
        now = self._clock()
        while self._failures and now - self._failures[0][0] >= _WINDOW_SECONDS:
            self._failures.popleft()
        own = [at for at, who in self._failures if who == address]
        moments = [at for at, _ in self._failures]
        until = [
            found[-most] + _WINDOW_SECONDS
            for found, most in ((own, _MOST_FAILURES), (moments, _MOST_FAILURES_OF_ALL))
            if len(found) >= most
        ]
        return math.ceil(max(until) - now) if until else 0

    def failed(self, address: str) -> None:
        """Count a wrong key."""
        self._failures.append((self._clock(), address))


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
