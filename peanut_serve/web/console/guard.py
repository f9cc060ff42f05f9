"""What stands before every page of the console: nothing that another web page makes a browser send gets through.

The port is on loopback, and so within reach of every page that the operator's browser has open. So a request has to
name a host that this server is known by (a page that rebinds its own name to 127.0.0.1 names another), every change
has to come from the console's own origin with the token of its session, and websockets are refused.
"""

import ipaddress
import secrets
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peanut_serve.web.console.sessions import Session, Sessions

ROOT = "/console"
LOGIN = f"{ROOT}/login"
LOGOUT = f"{ROOT}/logout"
LIVE = f"{ROOT}/live"
STATIC = f"{ROOT}/static/"
TOKEN_HEADER = "x-console-token"

_MOST_BYTES = 128 << 10  # of a body
_SAFE = ("GET", "HEAD")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # `no-referrer` would make browsers send `Origin: null` with the login
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware around the console's routes; puts the session into the scope, as `session`.

    Args:
        app: the routes.
        sessions: the logins.
        hosts: names by which browsers reach this server, besides loopback and addresses.
        cookie: name of the cookie with the secret of a session.
        bodies: path -> the most bytes of a body, where it is not that of the console's own forms.
    """

    def __init__(
        self, app: ASGIApp, sessions: Sessions, hosts: Iterable[str], cookie: str, bodies: Mapping[str, int]
    ) -> None:
        self._app, self._sessions, self._cookie, self._bodies = app, sessions, cookie, bodies
        self._hosts = {*_LOOPBACK, *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a connection, or pass it on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "the console does not use websockets"})
            return
        headers = Headers(scope=scope)
        is_use = scope["path"] != LIVE  # an open page asks for it by itself, and stays open after its person has left
        scope["session"] = session = self._sessions.find(secret_in(headers, self._cookie), is_use)
        refusal = self._foreign(scope, headers) or self._without_session(scope, headers, session)
        most = _MOST_BYTES if refusal else self._bodies.get(scope["path"], _MOST_BYTES)
        await (refusal or self._app)(scope, _limited(receive, most), _with_headers(send))

    def _foreign(self, scope: Scope, headers: Headers) -> Response | None:
        """The refusal of a request that did not come from the console's own pages."""
        host = headers.get("host", "")
        if (name := _name_of(host)) is None or not (name in self._hosts or _is_address(name)):
            found = f"this server is not known as {host[:80]!r}"
            return refusal(403, f"{found}; open it by its address, or start it with --console-host")
        if scope["method"] in _SAFE:
            return None
        schemes = ("https",) if scope.get("scheme") == "https" else ("http", "https")
        is_own = headers.get("origin") in [f"{scheme}://{host}" for scheme in schemes]
        if not is_own or headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return refusal(403, "the request does not come from the console's own page")
        return None

    def _without_session(self, scope: Scope, headers: Headers, session: Session | None) -> Response | None:
        """The refusal of a request that needs a login, or the token of one."""
        path, is_safe = scope["path"], scope["method"] in _SAFE
        if path == LOGIN or (path.startswith(STATIC) and is_safe):
            return None
        if session is None:
            if path in (ROOT, f"{ROOT}/") and is_safe:
                return RedirectResponse(LOGIN, 303)
            return refusal(401, "the session has ended; log in again")
        given = headers.get(TOKEN_HEADER, "").encode()
        if not is_safe and not secrets.compare_digest(given, session.token.encode()):
            return refusal(403, "the token of the session is missing or wrong; reload the page")
        if not is_safe and path != LOGOUT and not session.operator.may_change:
            return refusal(403, f"the key of {session.operator.name} is read-only: it shows, and changes nothing")
        return None


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error for the console's script, which shows the message."""
    return JSONResponse({"error": message}, status, headers)


def secret_in(headers: Headers, cookie: str) -> str | None:
    """The secret that a browser sent in a cookie."""
    return cookie_parser(headers.get("cookie", "")).get(cookie)


def _name_of(host: str) -> str | None:
    """The name in a Host header, in lower case and without the port; None if it is malformed."""
    try:
        split = urlsplit(f"//{host}")
        _ = split.port
    except ValueError:
        return None
    return split.hostname if split.netloc == host and "@" not in host else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True  # a page cannot rebind an address, only a name


def _limited(receive: Receive, most: int) -> Receive:
    size = 0

    async def limited() -> Message:
        """End the request as if its client had left, if its body is too large for anything that the console sends."""
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        return message if size <= most else {"type": "http.disconnect"}

    return limited


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        """Add the headers that keep a browser from doing more than the console needs."""
        if message["type"] == "http.response.start":
            given: list[Any] = list(message.get("headers", ()))
            known = {key.lower() for key, _ in given}
            own = ((key.encode(), value.encode()) for key, value in _HEADERS.items())
            message = {**message, "headers": [*given, *(pair for pair in own if pair[0] not in known)]}
        await send(message)

    return sending
