"""Middleware that every request passes: it knows the route and the client, and waits for the variant's weights.

It is plain ASGI, so that streams pass unchanged. It runs after vLLM's own check of API keys, which leaves out routes
that do not begin with /v1, /v2, /inference or /cohere, and which there is none of if there is a keys file.
"""

from collections.abc import Callable, Sequence

from converters.errors import PeanutError
from peanut_serve.errors import ServingError, UnauthorizedError
from peanut_serve.signals.tracing import request_span
from peanut_serve.swapping.server import VariantServer
from peanut_serve.tenants.visits import Tenants, Visit, current_visit
from peanut_serve.web.clients import Clients, check_route, telling_rate
from peanut_serve.web.exchange import Admit, App, Exchange, Send
from peanut_serve.web.refusals import Message, refusal_messages
from peanut_serve.web.request_body import (
    Bodies,
    ClientLimits,
    Receive,
    Scope,
    Take,
    parse_body,
    read_body,
    variant_of,
)
from peanut_serve.web.routes import Access, access_to

_WITHOUT_BODY = ("GET", "HEAD")


class VariantMiddleware:
    """Holds the weights of the right variant for the duration of each request.

    Args:
        app: the application that handles requests.
        find_server: returns the server, once it exists.
        admit: called with the admitted request, in the context of that request; with None for a request that
            needs the names, but no weights.
        keys: API keys of clients without limits of their own.
        limits: of a client.
        tenants: of the keys file, if there is one. Without keys and tenants, no key is needed.
        is_behind_front: whether all clients are a fleet's front.
    """

    def __init__(
        self,
        app: App,
        find_server: Callable[[], VariantServer],
        admit: Admit,
        keys: Sequence[str] = (),
        limits: ClientLimits = ClientLimits(),  # noqa: B008 - it is frozen
        tenants: Tenants | None = None,
        is_behind_front: bool = False,
    ) -> None:
        self._app, self._find_server, self._admit, self._limits = app, find_server, admit, limits
        self._clients = Clients(keys, tenants, is_behind_front)
        self._bodies = Bodies(limits.body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "peanut-serve does not serve websockets"})
        elif scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
        elif _access(scope) is Access.OPEN:
            if _path(scope).rstrip("/") == "/metrics":
                await self._find_server().observe()  # here, in the event loop: metrics are collected in a thread
            await self._app(scope, receive, send)
        else:
            await self._keyed(scope, receive, send)

    async def _keyed(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            visit = await self._clients.enter(scope)
        except ServingError as error:
            await _refuse(error, send)
            return
        with visit, self._bodies.share() as take:
            send = telling_rate(send, visit)
            access = _access(scope)
            try:
                check_route(scope, _path(scope), access, visit)
            except ServingError as error:
                await _refuse(error, send)
                return
            current_visit.set(visit)
            if access is Access.ANSWER and scope["method"] == "POST":
                exchange = Exchange(self._app, self._find_server(), self._admit, self._limits, visit, take)
                with request_span(scope):
                    await exchange.run(scope, receive, send)
                return
            if access is Access.NAMES:
                self._admit(None)
            if scope["method"] in _WITHOUT_BODY:
                await self._app(scope, receive, send)
            else:
                await self._weightless(scope, receive, send, visit, take)

    async def _weightless(self, scope: Scope, receive: Receive, send: Send, visit: Visit, take: Take) -> None:
        """A request that needs no weights: its body has the same limits, and names what its tenant may use."""
        try:
            if (body := await read_body(receive, self._limits, take)) is None:
                return
            if _access(scope) is Access.NAMES and scope["method"] == "POST" and visit.is_restricted:
                visit.check(variant_of(parse_body(body), scope) or self._find_server().base_name)
        except PeanutError as error:
            await _refuse(error, send)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            """The body, which was read already."""
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)


async def _refuse(error: PeanutError, send: Send) -> None:
    headers = [(b"www-authenticate", b"Bearer")] if isinstance(error, UnauthorizedError) else []
    for message in refusal_messages(error, headers):
        await send(message)


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _access(scope: Scope) -> Access:
    return access_to(_path(scope))
