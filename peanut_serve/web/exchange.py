"""One request that needs the weights of a variant, and its response."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any

from converters.errors import PeanutError
from peanut_serve.errors import EngineDownError, SwapError, VariantError, shown
from peanut_serve.settings.versions import released_name
from peanut_serve.swapping import metrics
from peanut_serve.swapping.requests import Admitted
from peanut_serve.swapping.server import VariantServer
from peanut_serve.tenants.keys import OTHERS
from peanut_serve.tenants.visits import Visit
from peanut_serve.web.refusals import Message, error_body, refusal_messages, status_of
from peanut_serve.web.request_body import (
    ClientLimits,
    Receive,
    Scope,
    Take,
    check_lifetime,
    check_own,
    parse_body,
    read_body,
    request_id,
    session_of,
    variant_of,
)

logger = logging.getLogger("vllm.peanut_serve")

Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]
Admit = Callable[[Admitted | None], object]

_FAREWELL_SECONDS = 2.0  # to tell a client that its request was aborted


class _StalledError(Exception):
    """The client does not read its response."""


class Exchange:
    """A request, from its body to the end of its response.

    Args:
        app: the application that handles requests.
        server: admits the request when the engine has the weights.
        admit: called with the admitted request, in the context in which the application handles it.
        limits: of this client.
        visit: whose request it is.
        take: room for its body, see `Bodies.share`.
    """

    def __init__(
        self, app: App, server: VariantServer, admit: Admit, limits: ClientLimits, visit: Visit, take: Take
    ) -> None:
        self._app, self._server, self._admit, self._limits = app, server, admit, limits
        self._visit, self._take = visit, take
        self._body = b""
        self._is_sent = False
        self._status = 0
        self._is_stream = False
        self._admitted: Admitted | None = None
        self._answering: asyncio.Task[None] | None = None
        self._is_aborted = self._is_stalled = self._is_complete = False
        self._sending_since: float | None = None  # a part of the response that the client has not read yet
        self._watch: asyncio.TimerHandle | None = None

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle the request."""
        self._scope, self._receive, self._send_on = scope, receive, send
        self._id = request_id(scope)
        asked = name = "unknown"
        arrival, is_failure = asyncio.get_running_loop().time(), False
        try:
            if (body := await read_body(receive, self._limits, self._take)) is None:
                return
            self._body, value = body, parse_body(body)
            asked = variant_of(value, scope) or self._server.base_name
            self._visit.check(asked)
            check_own(value, self._visit)
            check_lifetime(value)
            name = self._server.catalogue.answering(asked, session_of(value, scope))
            outcome = await self._answer(name, asked)
            is_failure = outcome.startswith("5")
        except PeanutError as error:
            outcome, is_failure = "refused", isinstance(error, SwapError | VariantError)
            with suppress(_StalledError):
                await self._refuse(self._visit.without_names(error, name))
        except Exception:
            if not self._is_stalled:
                self._record(name, asked, "500", arrival, is_failure=True)
                raise
            outcome = "stalled"  # the HTTP server closes a connection whose response is not complete
            logger.info("request=%s: the client does not read its response", shown(self._id))
        self._record(name, asked, outcome, arrival, is_failure)

    def _record(self, name: str, asked: str, outcome: str, arrival: float, is_failure: bool) -> None:
        """Count the request for the version that answered it, or should have."""
        if self._admitted is not None:
            name = self._admitted.name
        if not self._server.has(name):
            name = asked  # a release that has ended meanwhile
        digest = self._admitted.version.digest if self._admitted is not None else None
        seconds = asyncio.get_running_loop().time() - arrival
        self._server.record_end(name, outcome, seconds, digest, is_failure)
        metrics.REQUESTS.labels(name if self._server.has(name) else "unknown", outcome).inc()
        if self._admitted is not None:
            metrics.PATH_REQUESTS.labels(self._admitted.path).inc()

    async def _answer(self, name: str, asked: str) -> str:
        disconnect = asyncio.create_task(self._until_disconnect())
        try:
            async with AsyncExitStack() as stack:
                serving = self._server.serving(name, self._abort, asked)
                entering = asyncio.create_task(stack.enter_async_context(serving))
                await _first_of(entering, disconnect)
                if not entering.done():
                    await _cancel(entering)
                    return "disconnected"
                self._admitted = entering.result()
                await _cancel(disconnect)
                if disconnect.done() and not disconnect.cancelled():
                    return "disconnected"
                self._visit.admit()
                self._admit(self._admitted)
                self._answering = asyncio.create_task(self._app(self._scope, self._replay, self._reply))
                self._look()
                if self._is_aborted:  # aborted before the task existed
                    self._answering.cancel()
                await self._finish(self._answering)
                if self._is_aborted:
                    return "aborted"
                return str(self._status) if self._status else "disconnected"
        finally:
            paid = released_name(asked)  # also for a share that a release has ended meanwhile
            self._visit.count(paid if self._server.has(paid) else OTHERS)
            if self._watch is not None:
                self._watch.cancel()
            await _cancel(disconnect)

    def _look(self) -> None:
        """Give up a response that its client has not read for too long; a timer, as a response has many parts."""
        loop, most = asyncio.get_running_loop(), self._limits.stall_seconds
        if self._sending_since is not None and loop.time() - self._sending_since >= most:
            self._is_stalled = True
            if self._answering is not None:
                self._answering.cancel()
            return
        self._watch = loop.call_later(most / 4, self._look)

    async def _finish(self, answering: "asyncio.Task[None]") -> None:
        """Wait for the response. If a swap aborts it, send an error in its place, or at the end of the stream.

        Raises `_StalledError` if the client does not read it.
        """
        try:
            await answering
        except asyncio.CancelledError:
            if self._is_stalled and not self._is_aborted:
                raise _StalledError from None
            if not self._is_aborted:
                await _cancel(answering)
                raise
            error = EngineDownError(
                f"the request ran longer than a swap waits, and was aborted ({self._id}); send it again", 1
            )
            with suppress(_StalledError):
                await self._say_farewell(error)

    async def _say_farewell(self, error: PeanutError) -> None:
        if not self._status:
            await self._refuse(error)
        elif self._is_stream and not self._is_complete:
            data = b"data: " + json.dumps(error_body(error, 503)).encode() + b"\n\n"
            await self._send_soon({"type": "http.response.body", "body": data, "more_body": False})

    def _abort(self) -> None:
        self._is_aborted = True
        if self._answering is not None:
            self._answering.cancel()

    async def _until_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _replay(self) -> Message:
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        return await self._receive()

    async def _reply(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            self._is_stream = any(key == b"content-type" and b"event-stream" in value for key, value in headers)
            message = {**message, "headers": [*headers, *self._headers()]}
        await self._send(message)

    async def _send(self, message: Message) -> None:
        """Send a part of the response; `_look` gives it up if the client does not read."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
        self._sending_since = asyncio.get_running_loop().time()
        try:
            await self._send_on(message)
        finally:
            self._sending_since = None
        self._is_complete = message["type"] == "http.response.body" and not message.get("more_body")

    async def _send_soon(self, message: Message) -> None:
        """Send an error. A swap may wait for this, so a client that does not read gets little time."""
        try:
            await asyncio.wait_for(self._send(message), min(_FAREWELL_SECONDS, self._limits.stall_seconds))
        except asyncio.TimeoutError:
            self._is_stalled = True
            raise _StalledError from None

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", self._id.encode("latin-1"))]
        if self._admitted is not None:
            headers.append((b"x-peanut-variant", self._admitted.name.encode()))
            headers.append((b"x-peanut-digest", self._admitted.version.digest.encode()))
            headers.append((b"x-peanut-path", self._admitted.path.encode()))
        return headers

    async def _refuse(self, error: PeanutError) -> None:
        logger.info("request=%s status=%d error=%s", shown(self._id), status_of(error), error)
        for message in refusal_messages(error, self._headers()):
            await self._send_soon(message)


async def _first_of(*tasks: "asyncio.Task[Any]") -> None:
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        for task in tasks:
            await _cancel(task)
        raise


async def _cancel(task: "asyncio.Task[Any]") -> None:
    """Cancel a task and wait until it is done, with any outcome."""
    task.cancel()
    await asyncio.wait([task], timeout=_FAREWELL_SECONDS)
