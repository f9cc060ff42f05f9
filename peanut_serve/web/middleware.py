"""Middleware that every request passes: it knows the route, checks the key, and waits for the variant's weights.

It is plain ASGI, so that streams pass unchanged. It runs after vLLM's own check of API keys, which leaves out routes
that do not begin with /v1, /v2, /inference or /cohere.
"""

from collections.abc import Callable, Sequence

from peanut_serve.errors import RouteRefusedError, ServingError, UnauthorizedError, shown
from peanut_serve.signals.tracing import request_span
from peanut_serve.swapping.server import VariantServer
from peanut_serve.web.bearer import BearerKeys
from peanut_serve.web.exchange import Admit, App, ClientLimits, Exchange, Receive, Send
from peanut_serve.web.refusals import refusal_messages
from peanut_serve.web.request_body import Scope
from peanut_serve.web.routes import Access, access_to, refusal_of


class VariantMiddleware:
    """Holds the weights of the right variant for the duration of each request.

    Args:
        app: the application that handles requests.
        find_server: returns the server, once it exists.
        admit: called with the admitted request, in the context of that request; with None for a request that
            needs the names, but no weights.
        keys: API keys; none means that no key is needed.
        limits: of a client.
    """

    def __init__(
        self,
        app: App,
        find_server: Callable[[], VariantServer],
        admit: Admit,
        keys: Sequence[str] = (),
        limits: ClientLimits = ClientLimits(),  # noqa: B008 - it is frozen
    ) -> None:
        self._app, self._find_server, self._admit, self._limits = app, find_server, admit, limits
        self._keys = BearerKeys(keys) if keys else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "peanut-serve does not serve websockets"})
        elif scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
        elif (error := self._refusal(scope)) is not None:
            headers = [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
            for message in refusal_messages(error, headers):
                await send(message)
        elif _access(scope) is Access.ANSWER and scope["method"] == "POST":
            with request_span(scope):
                await Exchange(self._app, self._find_server(), self._admit, self._limits).run(scope, receive, send)
        else:
            if _access(scope) is Access.NAMES:
                self._admit(None)
            elif _path(scope).rstrip("/") == "/metrics":
                await self._find_server().observe()  # here, in the event loop: metrics are collected in a thread
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ServingError | None:
        path, access = _path(scope), _access(scope)
        if access is not Access.OPEN and self._keys is not None and not self._keys.include(scope):
            return UnauthorizedError("the API key is missing or wrong; send it as Authorization: Bearer KEY")
        if access is Access.REFUSED:
            reason = refusal_of(path) or "peanut-serve does not know this route"
            return RouteRefusedError(f"{scope['method']} {shown(path)} is not served: {reason}")
        return None


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _access(scope: Scope) -> Access:
    return access_to(_path(scope))
