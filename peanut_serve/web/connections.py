"""Connections, below HTTP: listening, and what a client may take before its request is known and while it reads.

uvicorn waits for the headers of a request without a limit, and keeps all of them. It looks its protocol up by the
name `auto`, for vLLM's server as well, so that one entry of a table bounds every port.
"""

import asyncio
import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
import uvicorn.config
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from converters.errors import OptionError
from peanut_serve.settings.tls import Certificate

logger = logging.getLogger("vllm.peanut_serve")

HEADER_SECONDS = 30.0  # until the headers of a request have arrived
HEADER_BYTES = 64 << 10  # of the headers of a request
ADMIN_CONNECTIONS = 64  # of the admin port
BODY_SECONDS = 30.0  # of the admin port, until a body has arrived
STALL_SECONDS = 30.0  # of the admin port, for which a client may read nothing of its answer
GRACE = 5  # seconds that answers in progress get when the server stops; it does not wait longer for a swap
CLOSE_SECONDS = 30.0  # between looks at a connection, of which the second ends one that is closed but not read


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
        self._was_closing = False
        self._since = self.loop.time()
        is_full = self.most is not None and len(self.connections) >= self.most and not self._make_room()
        super().connection_made(transport)
        self._next_look = self.loop.call_later(CLOSE_SECONDS, self._look)
        if is_full:
            self._refuse(503, "TooManyConnections", f"{self.most} requests are being answered; try again later")
        else:
            self._given_up = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.transport.is_closing():
            return
        is_next = self._is_answering and not self.cycle.more_body  # of the next request
        super().data_received(data)
        if self._is_answering or self not in self.connections:  # it has become another protocol's
            self._stop_waiting()
            # h11 reads no headers meanwhile; httptools does, until they are complete
            waits = is_next and self._is_answering and not getattr(self, "pipeline", True)
            self._unparsed = self._unparsed + len(data) if waits else 0
            if self._unparsed > HEADER_BYTES:
                self.transport.close()
            return
        if self._given_up is None:
            self._given_up = self.loop.call_later(HEADER_SECONDS, self._give_up)
        if self.cycle is None or not self.cycle.more_body:  # else it may be the rest of a body
            self._unparsed += len(data)
            if self._unparsed > HEADER_BYTES:
                self._refuse(431, "RequestTooLargeError", f"the headers are larger than {HEADER_BYTES >> 10} KiB")

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._next_look.cancel()
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _make_room(self) -> bool:
        """End the oldest connection without a request, so that those who do nothing keep nobody out."""
        idle = [one for one in self.connections if not one._is_answering and not one.transport.is_closing()]
        if idle:
            min(idle, key=lambda one: one._since).transport.abort()
        return bool(idle)

    def _look(self) -> None:
        """End a connection that was closed long ago, but whose client does not read what it was sent last."""
        if self.transport.is_closing():
            if self._was_closing:
                self.transport.abort()
                return
            self._was_closing = True
        self._next_look = self.loop.call_later(CLOSE_SECONDS, self._look)

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
    """The same for the admin port, whose connections are counted, and end if their client does not read."""

    most = ADMIN_CONNECTIONS
    _stalled: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)


def bound_connections() -> None:
    """Bound the connections of every server that uvicorn starts in this process from now on."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"


class TimeLimit:
    """Gives up a request whose body does not arrive.

    Args:
        app: answers the requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        await self._app(scope, _in_time(receive) if scope["type"] == "http" else receive, send)


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


class _Server(uvicorn.Server):
    """Leaves signals to vLLM, which stops the tasks in its loop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int, what: str = "the admin API") -> socket.socket:
    """Listen before the engine starts, so that a port that is already in use is reported at once.

    Raises `OptionError` if the address cannot be used.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OptionError(
            f"{what} cannot listen on {host}:{port}: {error.strerror}; choose another port or address"
        ) from None
    # inherited by connections; asyncio does not set it, as this socket does not name TCP: saves 40 ms per response
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def serve_on(app: ASGIApp, listener: socket.socket, certificate: Certificate | None = None) -> None:
    """Serve the app in the running loop until cancelled, with TLS if there is a certificate."""
    files = {"ssl_certfile": certificate.certfile, "ssl_keyfile": certificate.keyfile} if certificate else {}
    # no log_config: vLLM configures uvicorn's loggers for both servers
    config = uvicorn.Config(
        TimeLimit(app),
        http=AdminProtocol,
        log_config=None,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=GRACE,
        **files,  # type: ignore[arg-type]
    )
    server = _Server(config)
    try:
        await server.serve([listener])
    except asyncio.CancelledError:
        if server.started:
            await server.shutdown([listener])
        raise
