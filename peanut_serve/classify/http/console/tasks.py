"""What people can do with tasks in the console, and how it joins the application of a server of tasks."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from peanut_serve.classify.http.asking import ask_task
from peanut_serve.classify.http.console import TaskConsole
from peanut_serve.classify.http.console.pages import TaskPages, Verb
from peanut_serve.classify.serving.server import TaskServer
from peanut_serve.errors import RequestBodyError, shown
from peanut_serve.web.audit import AuditLog, caller
from peanut_serve.web.console.guard import ROOT
from peanut_serve.web.console.shell import Console, session_caller

logger = logging.getLogger("peanut_serve.classify")

_STATIC = Path(__file__).with_name("static")
_PLAYGROUND = f"{ROOT}/playground"


def task_console(server: TaskServer, console: TaskConsole, body_bytes: int) -> ASGIApp:
    """The console as an application of its own. Raises `OptionError` if the key cannot be sent by a form.

    Args:
        server: what it shows and changes.
        console: where it is.
        body_bytes: the most of what the playground sends.
    """
    tasks = _Tasks(server, console.audit)
    routes = [
        Route(f"{ROOT}/dialog", tasks.dialog),
        Route(f"{ROOT}/act", tasks.act, methods=["POST"]),
        Route(_PLAYGROUND, tasks.playground, methods=["POST"]),
    ]
    static, bodies = {"tasks": _STATIC}, {_PLAYGROUND: body_bytes}
    return Console(tasks.pages, console.key, console.port, console.hosts, routes, static, bodies).app


class _Tasks:
    """The handlers. They are methods, as they share the pages."""

    def __init__(self, server: TaskServer, audit: AuditLog | None) -> None:
        self._server, self._audit = server, audit
        self.pages = TaskPages(server)

    async def dialog(self, request: Request) -> Response:
        """What is asked before an action."""
        query = request.query_params
        return HTMLResponse(self.pages.dialog(_verb(query.get("verb", "")), query.get("name", "")))

    async def act(self, request: Request) -> Response:
        """Carry out an action; it goes on if the browser leaves."""
        try:
            asked = json.loads(await request.body())
            given, named = asked["verb"], asked["name"]
        except (ValueError, RecursionError, KeyError, TypeError):
            given = named = None
        if not isinstance(given, str) or not isinstance(named, str):
            raise RequestBodyError("expected a JSON object with verb and name")
        verb, name = _verb(given), self.pages.row(named).name
        who = session_caller(request)
        logger.info("%s from %s: %s %s", who.key, who.address, verb, name)
        caller.set(who)
        noting = self._audit.noting(verb, name, lambda: self._digest(name), dict) if self._audit else nullcontext()
        with noting:
            await self._carry_out(verb, name)
        return JSONResponse(await self.pages.sections(is_new=True))

    async def _carry_out(self, verb: Verb, name: str) -> None:
        if verb == "close":
            await self._server.close_task(name)
            return
        if verb == "reload":
            self._server.library.reread(name)
        await self._server.load(name)

    def _digest(self, name: str) -> str | None:
        """Of the version that was found last."""
        version = self._server.library.found().get(name)
        return version.digest if version is not None else None

    async def playground(self, request: Request) -> Response:
        """What a task says of an image, a sound or a text, as a client would get it; the digest is in the headers."""
        name = self.pages.row(request.query_params.get("name", "")).name
        found, written = await ask_task(
            self._server, name, await request.body(), request.headers.get("content-type", "")
        )
        headers = {"x-peanut-digest": found.version.digest}
        return Response(written, media_type="application/json", headers=headers)


def _verb(given: str) -> Verb:
    """Raises `RequestBodyError` if there is no such action."""
    for verb in get_args(Verb):
        if verb == given:
            found: Verb = verb
            return found
    raise RequestBodyError(f"there is no action {shown(given)}")
