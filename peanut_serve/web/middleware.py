"""Middleware that every request to the model passes: it waits for the variant's weights, and names the variant.

It is plain ASGI, so that streams pass unchanged, and runs after vLLM's check of API keys. A route skips the wait only
if it is known to need no weights, so a route that a later vLLM adds cannot answer with the wrong weights.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextlib import AsyncExitStack, suppress
from typing import Any
from uuid import uuid4

from converters.errors import PeanutError
from peanut_serve.errors import EngineDownError, ServingError, TryLaterError
from peanut_serve.swapping import metrics
from peanut_serve.swapping.server import Admitted, VariantServer

logger = logging.getLogger("vllm.peanut_serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Coroutine[Any, Any, None]]

# POST routes that need no weights: tokenization, control of requests and of the server
_WITHOUT_WEIGHTS = (
    "/tokenize", "/detokenize", "/render", "/derender", "/count_tokens", "/cancel", "/ping",
    "/start_profile", "/stop_profile", "/load_lora_adapter", "/unload_lora_adapter",
    # added by VLLM_SERVER_DEV_MODE
    "/collective_rpc", "/pause", "/resume", "/abort_requests", "/sleep", "/wake_up", "/reset_prefix_cache",
    "/reset_mm_cache", "/reset_encoder_cache",
)  # fmt: skip


class VariantMiddleware:
    """Holds the weights of the right variant for the duration of each request.

    Args:
        app: the application that handles requests.
        find_server: returns the server, once it exists.
        admit: called with the admitted request, in the context of that request; with None for a request that
            needs the names, but no weights.
    """

    def __init__(
        self, app: App, find_server: Callable[[], VariantServer], admit: Callable[[Admitted | None], object]
    ) -> None:
        self._app, self._find_server, self._admit = app, find_server, admit

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "websocket":
            await send(
                {"type": "websocket.close", "code": 1008, "reason": "websockets are not supported with swapping"}
            )
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] == "POST" and not scope["path"].endswith(_WITHOUT_WEIGHTS):
            await _Exchange(self._app, self._find_server(), self._admit, scope, receive, send).run()
        else:
            if scope["method"] == "POST" or scope["path"].endswith("/models"):
                self._admit(None)
            await self._app(scope, receive, send)


class _Exchange:
    """One request and its response."""

    def __init__(
        self,
        app: App,
        server: VariantServer,
        admit: Callable[[Admitted | None], object],
        scope: MutableMapping[str, Any],
        receive: Receive,
        send: Send,
    ) -> None:
        self._app, self._server, self._admit = app, server, admit
        self._scope, self._receive, self._send = scope, receive, send
        self._id = _request_id(scope)
        self._body = b""
        self._is_sent = False
        self._status = 0
        self._is_stream = False
        self._admitted: Admitted | None = None
        self._answering: asyncio.Task[None] | None = None
        self._is_aborted = False

    async def run(self) -> None:
        if not await self._read_body():
            return
        try:
            name = _variant_of(self._body, self._server)
            outcome = await self._answer(name)
        except PeanutError as error:
            await self._refuse(error)
            name, outcome = _metric_name(self._server, self._body), "refused"
        metrics.REQUESTS.labels(name, outcome).inc()

    async def _answer(self, name: str) -> str:
        disconnect = asyncio.create_task(self._until_disconnect())
        try:
            async with AsyncExitStack() as stack:
                entering = asyncio.create_task(stack.enter_async_context(self._server.serving(name, self._abort)))
                await _first_of(entering, disconnect)
                if not entering.done():
                    await _cancel(entering)
                    return "disconnected"
                self._admitted = entering.result()
                await _cancel(disconnect)
                if disconnect.done() and not disconnect.cancelled():
                    return "disconnected"
                self._admit(self._admitted)
                self._answering = asyncio.create_task(self._app(self._scope, self._replay, self._reply))
                if self._is_aborted:  # aborted before the task existed
                    self._answering.cancel()
                await self._finish(self._answering)
                if self._is_aborted:
                    return "aborted"
                return str(self._status) if self._status else "disconnected"
        finally:
            await _cancel(disconnect)

    async def _finish(self, answering: "asyncio.Task[None]") -> None:
        """Wait for the response. If a swap aborts it, send an error in its place, or at the end of the stream."""
        try:
            await answering
        except asyncio.CancelledError:
            if not self._is_aborted:
                await _cancel(answering)
                raise
            error = EngineDownError(
                f"the request ran longer than a swap waits, and was aborted ({self._id}); send it again", 1
            )
            if not self._status:
                await self._refuse(error)
            elif self._is_stream:
                data = b"data: " + json.dumps(_error_body(error, 503)).encode() + b"\n\n"
                await self._send({"type": "http.response.body", "body": data, "more_body": False})

    def _abort(self) -> None:
        self._is_aborted = True
        if self._answering is not None:
            self._answering.cancel()

    async def _read_body(self) -> bool:
        """Read the request's body. Returns whether it is complete: false if the client disconnected."""
        parts: list[bytes] = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return False
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                self._body = b"".join(parts)
                return True

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
            self._status = message["status"]
            headers = list(message.get("headers", ()))
            self._is_stream = any(key == b"content-type" and b"event-stream" in value for key, value in headers)
            message = {**message, "headers": [*headers, *self._headers()]}
        await self._send(message)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", self._id.encode("latin-1"))]
        if self._admitted is not None:
            headers.append((b"x-peanut-variant", self._admitted.name.encode()))
            headers.append((b"x-peanut-digest", self._admitted.version.digest.encode()))
        return headers

    async def _refuse(self, error: PeanutError) -> None:
        status = error.status if isinstance(error, ServingError) else 500
        logger.info("request=%s status=%d error=%s", self._id, status, error)
        headers = [(b"content-type", b"application/json"), *self._headers()]
        if isinstance(error, TryLaterError):
            headers.append((b"retry-after", str(error.retry_after).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": json.dumps(_error_body(error, status)).encode()})


class RequestBodyError(ServingError):
    """The body does not name a variant."""

    status = 400


def _variant_of(body: bytes, server: VariantServer) -> str:
    """The variant that the request names in `model`; the base if it names none, as in vLLM."""
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise RequestBodyError(
            "the body is not valid JSON, so the variant is unknown; send JSON with the variant's name in model"
        ) from None
    name = value.get("model") if isinstance(value, dict) else None
    if name is not None and not isinstance(name, str):
        raise RequestBodyError(f"model is a JSON {type(name).__name__}; expected the name of a variant")
    return name or server.base_name


def _metric_name(server: VariantServer, body: bytes) -> str:
    """The variant's name for metrics; `unknown` for any other name, which would add a label per name."""
    with suppress(PeanutError):
        name = _variant_of(body, server)
        if name in server.names():
            return name
    return "unknown"


def _error_body(error: PeanutError, status: int) -> dict[str, Any]:
    kind = type(error).__name__
    return {"error": {"message": str(error), "type": kind, "param": "model", "code": status}}


def _request_id(scope: MutableMapping[str, Any]) -> str:
    """The client's X-Request-Id, or a new id that vLLM then uses as well."""
    for key, value in scope["headers"]:
        if key == b"x-request-id":
            return str(value.decode("latin-1"))
    made = uuid4().hex
    scope["headers"] = [*scope["headers"], (b"x-request-id", made.encode())]
    return made


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
    await asyncio.wait([task])
