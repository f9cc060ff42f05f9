"""The console of a server of variants, and how it joins the application of the admin port."""

import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import get_args

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from peanut_serve.web.audit import caller
from peanut_serve.web.console.actions import Action, Verb, perform
from peanut_serve.web.console.costs import comparison_cost
from peanut_serve.web.console.data_route import DataRoute
from peanut_serve.web.console.guard import ROOT, refusal
from peanut_serve.web.console.pages import Pages
from peanut_serve.web.console.playground import Trial, compare
from peanut_serve.web.console.shell import Console, Fork, session_caller
from peanut_serve.web.operators import Operators
from peanut_serve.web.schema import Control

_MOST_TRIALS = 2  # of the playground, at a time


@dataclass(frozen=True)
class ConsoleHost:
    """The server that a console belongs to.

    Attributes:
        control: what it shows and changes.
        key: the admin key, or who has which.
        port: of the admin API; part of the cookie's name, as browsers send cookies to all ports of a host.
        hosts: names by which browsers reach it, besides loopback and addresses.
        drain_seconds: after which a swap aborts running requests.
        route: answers the playground's prompts; None if there is none.
    """

    control: Control
    key: str | Operators
    port: int
    hosts: Iterable[str] = ()
    drain_seconds: float = 60.0
    route: DataRoute | None = None


def add_console(app: FastAPI, host: ConsoleHost) -> None:
    """Serve the console under /console of the application of the admin API, which keeps its own check of the key."""
    app.add_middleware(Fork, console=console_app(host))


def console_app(host: ConsoleHost) -> ASGIApp:
    """The console as an application of its own. Raises `OptionError` if the key cannot be sent by a form."""
    variants = _Variants(host)
    return Console(variants.pages, host.key, host.port, host.hosts, variants.routes).app


class _Variants:
    """What people can do with variants. The handlers are methods, as they share the pages.

    Attributes:
        pages: what is shown.
        routes: of the handlers.
    """

    def __init__(self, host: ConsoleHost) -> None:
        self._host, self._trials = host, 0
        self.pages = Pages(host.control, host.drain_seconds)
        self.routes = [
            Route(f"{ROOT}/dialog", self.dialog),
            Route(f"{ROOT}/act", self.act, methods=["POST"]),
            Route(f"{ROOT}/comparison", self.comparison),
            Route(f"{ROOT}/playground", self.playground, methods=["POST"]),
        ]

    async def dialog(self, request: Request) -> Response:
        """What is asked before an action."""
        query = request.query_params
        verb = next((one for one in get_args(Verb) if one == query.get("verb")), None)
        if verb is None:
            return refusal(422, f"there is no action {query.get('verb', '')[:80]!r}")
        return HTMLResponse(await self.pages.dialog(verb, query.get("name"), query.get("digest")))

    async def act(self, request: Request) -> Response:
        """Carry out an action; it goes on if the browser leaves."""
        try:
            action = Action.model_validate_json(await request.body())
        except ValidationError as error:
            return refusal(422, _first(error))
        caller.set(session_caller(request))
        await perform(self._host.control, action)
        return JSONResponse(await self.pages.sections(is_new=True))

    async def comparison(self, request: Request) -> Response:
        """What the playground's choice costs."""
        names = request.query_params.getlist("name")
        return JSONResponse({"cost": comparison_cost(await self.pages.view(), names)})

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


def _first(error: ValidationError) -> str:
    one = error.errors()[0]
    return f"{'.'.join(map(str, one['loc'])) or 'the body'}: {one['msg']}"
