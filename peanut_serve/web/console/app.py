"""The console's routes, and how they join the application of the admin port."""

import json
import logging
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qs

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from converters.errors import PeanutError
from peanut_serve.errors import ServingError, shown
from peanut_serve.settings.admin_key import checked_key
from peanut_serve.web.audit import Caller, caller
from peanut_serve.web.console.actions import Action, Verb, perform
from peanut_serve.web.console.costs import comparison_cost
from peanut_serve.web.console.data_route import DataRoute
from peanut_serve.web.console.guard import LIVE, LOGIN, ROOT, Guard, refusal, secret_in
from peanut_serve.web.console.pages import Pages
from peanut_serve.web.console.playground import Trial, compare
from peanut_serve.web.console.sessions import Attempts, Sessions, is_same
from peanut_serve.web.schema import Control

logger = logging.getLogger("vllm.peanut_serve")

_MOST_TRIALS = 2  # of the playground, at a time
_STATIC = Path(__file__).with_name("static")


@dataclass(frozen=True)
class ConsoleHost:
    """The server that a console belongs to.

    Attributes:
        control: what it shows and changes.
        key: the admin key.
        port: of the admin API; part of the cookie's name, as browsers send cookies to all ports of a host.
        hosts: names by which browsers reach it, besides loopback and addresses.
        drain_seconds: after which a swap aborts running requests.
        route: answers the playground's prompts; None if there is none.
    """

    control: Control
    key: str
    port: int
    hosts: Iterable[str] = ()
    drain_seconds: float = 60.0
    route: DataRoute | None = None


def add_console(app: FastAPI, host: ConsoleHost) -> None:
    """Serve the console under /console of the application of the admin API, which keeps its own check of the key."""
    app.add_middleware(_Fork, console=console_app(host))


class _Fork:
    """Sends requests for the console to it, and all others on."""

    def __init__(self, app: ASGIApp, console: ASGIApp) -> None:
        self._app, self._console = app, console

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_console = scope["type"] != "lifespan" and f"{scope['path']}/".startswith(f"{ROOT}/")
        await (self._console if is_console else self._app)(scope, receive, send)


def console_app(host: ConsoleHost) -> ASGIApp:
    """The console as an application of its own. Raises `OptionError` if the key cannot be sent by a form."""
    return _Console(host).app


class _Console:
    """The handlers. They are methods, as all share the sessions."""

    def __init__(self, host: ConsoleHost) -> None:
        self._host, self._key = host, checked_key(host.key, "the server's settings")
        self._pages = Pages(host.control, host.drain_seconds)
        self._sessions, self._attempts = Sessions(), Attempts()
        self._cookie = f"peanut_console_{host.port}"
        self._trials = 0
        handlers: dict[Any, Any] = {
            PeanutError: _answer_refusal,
            ClientDisconnect: _answer_too_large,
            HTTPException: _answer_http_error,
            Exception: _answer_bug,
        }
        routes: list[BaseRoute] = [
            Route(ROOT, self.page),
            Route(f"{ROOT}/", self.page),
            Route(LOGIN, self.login_page),
            Route(LOGIN, self.login, methods=["POST"]),
            Route(f"{ROOT}/logout", self.logout, methods=["POST"]),
            Route(LIVE, self.live),
            Route(f"{ROOT}/dialog", self.dialog),
            Route(f"{ROOT}/act", self.act, methods=["POST"]),
            Route(f"{ROOT}/comparison", self.comparison),
            Route(f"{ROOT}/playground", self.playground, methods=["POST"]),
            Mount(f"{ROOT}/static", StaticFiles(directory=_STATIC)),
        ]
        routes_app = Starlette(routes=routes, exception_handlers=handlers)
        self.app: ASGIApp = Guard(routes_app, self._sessions, host.hosts, self._cookie)

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
        if not is_same(form.get("key", [""])[0].strip(), self._key):
            self._attempts.failed(address)
            logger.warning("console: a wrong key from %s", shown(address))
            return HTMLResponse(self._pages.login("This is not the admin key of this server."), 403)
        answer, secret = RedirectResponse(ROOT, 303), self._sessions.open()
        if (session := self._sessions.find(secret)) is not None:
            logger.info("console: session %d from %s", session.number, shown(address))
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
        return HTMLResponse(await self._pages.page(request.scope["session"].token))

    async def live(self, _: Request) -> Response:
        """The sections that change by themselves."""
        return JSONResponse(await self._pages.sections())

    async def dialog(self, request: Request) -> Response:
        """What is asked before an action."""
        query = request.query_params
        verb = next((one for one in get_args(Verb) if one == query.get("verb")), None)
        if verb is None:
            return refusal(422, f"there is no action {query.get('verb', '')[:80]!r}")
        return HTMLResponse(await self._pages.dialog(verb, query.get("name"), query.get("digest")))

    async def act(self, request: Request) -> Response:
        """Carry out an action; it goes on if the browser leaves."""
        try:
            action = Action.model_validate_json(await request.body())
        except ValidationError as error:
            return refusal(422, _first(error))
        caller.set(self._caller(request))
        await perform(self._host.control, action)
        return JSONResponse(await self._pages.sections(is_new=True))

    async def comparison(self, request: Request) -> Response:
        """What the playground's choice costs."""
        names = request.query_params.getlist("name")
        return JSONResponse({"cost": comparison_cost(await self._pages.view(), names)})

    async def playground(self, request: Request) -> Response:
        """The answers of several variants, as lines of JSON."""
        try:
            trial = Trial.model_validate_json(await request.body())
        except ValidationError as error:
            return refusal(422, _first(error))
        if self._host.route is None:
            return refusal(503, "this server has no route that completes texts")
        if self._trials >= _MOST_TRIALS:
            return refusal(429, f"{self._trials} comparisons are running; wait for one of them to end")
        return StreamingResponse(self._lines(self._host.route, trial), media_type="application/x-ndjson")

    async def _lines(self, route: DataRoute, trial: Trial) -> AsyncIterator[str]:
        self._trials += 1
        try:
            async for event in compare(route, self._host.control, trial):
                yield json.dumps(event) + "\n"
        finally:
            self._trials -= 1

    def _caller(self, request: Request) -> Caller:
        address = request.client.host if request.client is not None else None
        return Caller(address, f"console session {request.scope['session'].number}")


def _first(error: ValidationError) -> str:
    one = error.errors()[0]
    return f"{'.'.join(map(str, one['loc'])) or 'the body'}: {one['msg']}"


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
