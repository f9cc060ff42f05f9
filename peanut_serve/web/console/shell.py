"""What every console does: it lets operators in, shows the page, and answers errors with sentences."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, ExceptionHandler, Receive, Scope, Send

from converters.errors import PeanutError
from peanut_serve.errors import ForbiddenError, ServingError, UnauthorizedError, shown
from peanut_serve.web.audit import Caller
from peanut_serve.web.console.guard import LIVE, LOGIN, LOGOUT, ROOT, STATIC, Guard, refusal, secret_in
from peanut_serve.web.console.live_pages import LivePages
from peanut_serve.web.console.sessions import Attempts, Sessions
from peanut_serve.web.operators import Operators, operators_of

logger = logging.getLogger("vllm.peanut_serve")

_STATIC = Path(__file__).with_name("static")


class Fork:
    """Sends requests for the console to it, and all others on."""

    def __init__(self, app: ASGIApp, console: ASGIApp) -> None:
        self._app, self._console = app, console

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        is_console = scope["type"] != "lifespan" and f"{scope['path']}/".startswith(f"{ROOT}/")
        await (self._console if is_console else self._app)(scope, receive, send)


class Console:
    """The handlers. They are methods, as all share the sessions.

    Args:
        pages: what it shows.
        key: the admin key, or who has which.
        port: of the server; part of the cookie's name, as browsers send cookies to all ports of a host.
        hosts: names by which browsers reach it, besides loopback and addresses.
        routes: what people can do in it.
        static: name -> folder of further files for its pages, which have them at /console/static/NAME.
        bodies: path -> the most bytes of a body, where it is not that of the console's own forms.

    Raises `OptionError` if the key cannot be sent by a form.
    """

    def __init__(
        self,
        pages: LivePages,
        key: str | Operators,
        port: int,
        hosts: Iterable[str],
        routes: Sequence[BaseRoute],
        static: Mapping[str, Path] | None = None,
        bodies: Mapping[str, int] | None = None,
    ) -> None:
        self._pages, self._operators = pages, operators_of(key)
        self._sessions, self._attempts = Sessions(self._operators), Attempts()
        self._cookie = f"peanut_console_{port}"
        errors: dict[Any, ExceptionHandler] = {
            PeanutError: _answer_refusal,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_too_large,
            Exception: _answer_bug,
        }
        own: list[BaseRoute] = [
            Route(ROOT, self.page),
            Route(f"{ROOT}/", self.page),
            Route(LOGIN, self.login_page),
            Route(LOGIN, self.login, methods=["POST"]),
            Route(LOGOUT, self.logout, methods=["POST"]),
            Route(LIVE, self.live),
            *(Mount(f"{STATIC}{name}", StaticFiles(directory=folder)) for name, folder in (static or {}).items()),
            Mount(f"{ROOT}/static", StaticFiles(directory=_STATIC)),
        ]
        routes_app = Starlette(routes=[*own, *routes], exception_handlers=errors)
        self.app: ASGIApp = Guard(routes_app, self._sessions, hosts, self._cookie, bodies or {})

    async def login_page(self, request: Request) -> Response:
        """The form; who is logged in does not need it."""
        return RedirectResponse(ROOT, 303) if request.scope["session"] else HTMLResponse(self._pages.login())

    async def login(self, request: Request) -> Response:
        """Open a session for whoever sends the key."""
        address = request.client.host if request.client is not None else ""
        if (wait := self._attempts.wait(address)) > 0:
            message = f"There were too many wrong keys. Try again in {wait} s."
            return HTMLResponse(self._pages.login(message), 429, {"Retry-After": str(wait)})
        form = parse_qs((await request.body()).decode("utf-8", "replace"))
        try:
            operator = self._operators.find(form.get("key", [""])[0].strip().encode())
        except (UnauthorizedError, ForbiddenError):
            self._attempts.failed(address)
            logger.warning("console: a wrong key from %s", shown(address))
            return HTMLResponse(self._pages.login("This is not an admin key of this server."), 403)
        answer, secret = RedirectResponse(ROOT, 303), self._sessions.open(operator)
        if (session := self._sessions.find(secret)) is not None:
            logger.info("console: session %d of %s from %s", session.number, operator.name, shown(address))
        answer.set_cookie(
            self._cookie, secret, path=ROOT, httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return answer

    async def logout(self, request: Request) -> Response:
        """End the session."""
        self._sessions.close(secret_in(request.headers, self._cookie))
        answer = JSONResponse({})
        answer.delete_cookie(self._cookie, path=ROOT, httponly=True, samesite="strict")
        return answer

    async def page(self, request: Request) -> Response:
        """The page."""
        session = request.scope["session"]
        return HTMLResponse(await self._pages.page(session.token, not session.operator.may_change))

    async def live(self, _: Request) -> Response:
        """The sections that change by themselves."""
        return JSONResponse(await self._pages.sections())


def session_caller(request: Request) -> Caller:
    """Whose session it is, for the audit log."""
    address = request.client.host if request.client is not None else None
    session = request.scope["session"]
    who = f"{session.operator.name}, " if session.operator.is_named else ""
    return Caller(address, f"{who}console session {session.number}")


async def _answer_refusal(_: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, ServingError) else 422
    return refusal(status, str(error))


async def _answer_http_error(_: Request, error: Exception) -> Response:
    found = error if isinstance(error, HTTPException) else HTTPException(500)
    return refusal(found.status_code, found.detail, found.headers)


async def _answer_too_large(_: Request, __: Exception) -> Response:
    return refusal(413, "the body is too large")


async def _answer_bug(_: Request, error: Exception) -> Response:
    return refusal(500, f"unexpected {type(error).__name__}; see the server's log")


def console_link(host: str, port: int, scheme: str = "http") -> str:
    """Where a browser on the machine of the server opens the console."""
    name: Any = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{name}:{port}{ROOT}"
