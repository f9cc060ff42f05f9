"""Connections, below HTTP: what a client may take before its request is known, and while it sends and reads.

uvicorn waits for the headers of a request without a limit, and keeps all of them. It looks its protocol up by the name
`auto`, for vLLM's server as well, so that one entry of a table bounds every port.
"""

import asyncio
import json
import logging
from typing import Any

import uvicorn.config
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

logger = logging.getLogger("vllm.peanut_serve")

HEADER_SECONDS = 30.0  # until the headers of a request have arrived
HEADER_BYTES = 64 << 10  # of the headers of a request
ADMIN_CONNECTIONS = 64  # of the admin port
BODY_SECONDS = 30.0  # of the admin port, until a body has arrived
STALL_SECONDS = 30.0  # of the admin port, for which a client may read nothing of its answer


class Bounds(asyncio.Protocol):
    """Closes a connection whose next request takes too long to begin, or has large headers; for uvicorn's protocols.

    Attributes:
        most: connections of the server; None for any number.
    """

    most: int | None = None
    connections: set[Any]
    transport: Any
    cycle: Any  # the request that is answered, or was answered last
    loop: asyncio.AbstractEventLoop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._given_up: asyncio.TimerHandle | None = None
        self._unparsed = 0  # bytes of headers that are not complete
        is_full = self.most is not None and len(self.connections) >= self.most
        super().connection_made(transport)
        if is_full:
            self._refuse(503, "TooManyConnections", f"{self.most} connections are open; close some, or try again")
        else:
            self._given_up = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._is_answering or self not in self.connections:  # it has become another protocol's
            self._unparsed = 0
            self._stop_waiting()
            return
        if self._given_up is None:
            self._given_up = self.loop.call_later(HEADER_SECONDS, self._give_up)
        if self.cycle is None or not self.cycle.more_body:  # else it may be the rest of a body
            self._unparsed += len(data)
            if self._unparsed > HEADER_BYTES:
                self._refuse(431, "RequestTooLargeError", f"the headers are larger than {HEADER_BYTES >> 10} KiB")

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_waiting(self) -> None:
        if self._given_up is not None:
            self._given_up.cancel()
            self._given_up = None

    def _give_up(self) -> None:
        self._given_up = None
        if not self._is_answering:
            self.transport.close()

    def _refuse(self, status: int, kind: str, message: str) -> None:
        if self.transport.is_closing():
            return
        logger.debug("a connection is refused with %d: %s", status, message)
        body = json.dumps({"error": {"type": kind, "message": message}}).encode()
        head = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        self.transport.close()


class BoundedProtocol(Bounds, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """The protocol that uvicorn chooses, with bounds."""


class AdminProtocol(BoundedProtocol):
    """The same for the admin port, whose connections are counted."""

    most = ADMIN_CONNECTIONS


def bound_connections() -> None:
    """Bound the connections of every server that uvicorn starts in this process from now on."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"


class _StalledError(Exception):
    """The client does not read its answer."""


class TimeLimits:
    """Gives up a request whose body does not arrive, or whose answer is not read.

    Args:
        app: answers the requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_in_time(message: Message) -> None:
            """Send a part of the answer."""
            try:
                await asyncio.wait_for(send(message), STALL_SECONDS)
            except asyncio.TimeoutError:
                raise _StalledError from None

        try:
            await self._app(scope, _in_time(receive), send_in_time)
        except _StalledError:
            logger.info("%s: the client does not read its answer", scope["path"])


def _in_time(receive: Receive) -> Receive:
    until, is_whole = asyncio.get_running_loop().time() + BODY_SECONDS, False

    async def receive_in_time() -> Message:
        """A part of the body. Raises `HTTPException` if it is late."""
        nonlocal is_whole
        if is_whole:
            return await receive()
        left = until - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(receive(), max(left, 0.0))
        except asyncio.TimeoutError:
            why = f"the body did not arrive within {BODY_SECONDS:.0f} s"
            raise HTTPException(408, why, {"Connection": "close"}) from None
        is_whole = not message.get("more_body")
        return message

    return receive_in_time
