"""What every request passes first: key, size and time of its body; and its answer last."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from converters.errors import PeanutError
from peanut_serve.classify.deadline import within
from peanut_serve.classify.serving.server import TaskServer
from peanut_serve.errors import (
    RequestBodyError,
    RequestTimeoutError,
    RequestTooLargeError,
    ServingError,
    TenantLimitError,
    TryLaterError,
    UnauthorizedError,
)
from peanut_serve.tenants.visits import Tenants, Visit, current_visit
from peanut_serve.web.clients import Clients, telling_rate
from peanut_serve.web.request_body import Bodies, ClientLimits

logger = logging.getLogger("peanut_serve.classify")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CLIENTS = ClientLimits(body_bytes=16 << 20, body_seconds=30.0)  # unless others are given
FACTS = "peanut"  # of a scope: what the application says about a request
_OPEN = ("/health", "/ready", "/metrics", "/openapi.json", "/v2/health/live", "/v2/health/ready")
_TASK = re.compile(r"/(?:v2/)?models/(?P<name>[^/]+)")


class Door:
    """Lets requests in.

    Args:
        app: the application.
        server: whose metrics count requests; while it is not ready, connections are closed after their answer.
        keys: of clients; empty if none is needed.
        limits: of each client.
        tenants: of the keys file, if there is one.
    """

    def __init__(
        self,
        app: App,
        server: TaskServer,
        keys: Sequence[str],
        limits: ClientLimits,
        tenants: Tenants | None = None,
    ) -> None:
        self._app, self._server, self._limits = app, server, limits
        self._clients = Clients(keys, tenants)
        self._bodies = Bodies(limits.body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, receive, send, self._server, self._limits)
        try:
            with await self._enter(scope) as tenant:
                visit.tell_rate(tenant)
                current_visit.set(tenant)
                self._check(scope, tenant)
                try:
                    await self._handle(visit, tenant)
                finally:
                    visit.count_usage(tenant)
        except _GoneError:
            visit.status = 499
        except PeanutError as error:
            await visit.refuse(error)
        visit.count()

    async def _enter(self, scope: Scope) -> Visit:
        """Begin a request."""
        if scope["path"] in _OPEN or f"{scope['path']}/".startswith("/console/"):  # which has its own login
            return Visit()
        return await self._clients.enter(scope)

    def _check(self, scope: Scope, tenant: Visit) -> None:
        """Every route with a task has its name in the path, so that its tenant is known before the body is read."""
        if (found := _TASK.match(scope["path"])) is not None:
            tenant.check(found["name"])
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise RequestBodyError("the body is compressed (Content-Encoding); send it as it is")
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size) > self._limits.body_bytes:
            raise self._too_large()

    def _too_large(self) -> RequestTooLargeError:
        return RequestTooLargeError(
            f"the request's body is larger than {self._limits.body_bytes >> 10} KiB; see --max-body"
        )

    async def _handle(self, visit: "_Visit", tenant: Visit) -> None:
        with self._bodies.share() as take:
            parts: list[bytes] = []
            taken, until = 0, time.monotonic() + self._limits.body_seconds
            while True:
                message = await visit.receive(until - time.monotonic())
                parts.append(message.get("body", b""))
                taken += len(parts[-1])
                if taken > self._limits.body_bytes:
                    raise self._too_large()
                take(len(parts[-1]))
                if not message.get("more_body"):
                    break
            visit.body = b"".join(parts)
            del parts
            tenant.admit()
            await self._app(visit.scope, visit.replay, visit.send)


class _GoneError(Exception):
    """The client went away, or does not read."""


class _Visit:
    """One request.

    Attributes:
        scope: of the request; under `FACTS` the application leaves the name and digest of the version.
        body: the whole body.
        status: of the answer; 0 before it has begun.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, server: TaskServer, limits: ClientLimits) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self._server, self._limits = server, limits
        self.body, self.status, self._is_read = b"", 0, False
        self._began = time.monotonic()
        self._facts: dict[str, str] = scope.setdefault(FACTS, {})

    def tell_rate(self, tenant: Visit) -> None:
        """Tell the client with the answer what it may send."""
        self._send = telling_rate(self._send, tenant)

    async def receive(self, seconds: float) -> Message:
        """A part of the body, within so many seconds."""
        try:
            message = await within(max(seconds, 0.0), self._receive())
        except asyncio.TimeoutError:
            most = self._limits.body_seconds
            raise RequestTimeoutError(f"the request's body did not arrive within {most:.0f} s") from None
        if message["type"] == "http.disconnect":
            raise _GoneError
        return message

    async def replay(self) -> Message:
        """The body, for the application."""
        if self._is_read:
            return await self._receive()
        self._is_read = True
        return {"type": "http.request", "body": self.body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Send a part of the answer. Raises `_GoneError` if the client does not read it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._headers()]}
        try:
            await within(self._limits.stall_seconds, self._send(message))
        except asyncio.TimeoutError:
            raise _GoneError from None

    async def refuse(self, error: PeanutError) -> None:
        """Answer with an error, unless an answer has begun."""
        if self.status:
            return
        status, body, headers = refusal(error)
        if not self._is_read:
            headers["connection"] = "close"  # the rest of the body is not read
        coded = [(key.encode(), value.encode()) for key, value in headers.items()]
        try:
            await self.send({"type": "http.response.start", "status": status, "headers": coded})
            await self.send({"type": "http.response.body", "body": body})
        except _GoneError:
            logger.info("%s: the client does not read its answer", self.scope["path"])

    def _headers(self) -> list[tuple[bytes, bytes]]:
        found = []
        if "digest" in self._facts:
            found.append((b"x-peanut-variant", self._facts["name"].encode()))
            found.append((b"x-peanut-digest", self._facts["digest"].encode()))
        if not self._server.is_ready:
            found.append((b"connection", b"close"))
        return found

    def count_usage(self, tenant: Visit) -> None:
        """As what a tenant has used, if a task was asked and found."""
        if {"asked", "digest"} <= self._facts.keys():
            tenant.count(self._facts["name"])

    def count(self) -> None:
        """In the metrics, if the request was for a task."""
        if "asked" in self._facts:
            seconds = time.monotonic() - self._began
            self._server.metrics.observe_request(self._facts.get("name"), str(self.status), seconds)


def refusal(error: PeanutError) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of an answer that reports an error; both protocols have the message as `error`."""
    # an error of converters is about the input, or about the files of the task
    status = error.status if isinstance(error, ServingError) else 422
    headers = {"content-type": "application/json"}
    if isinstance(error, TryLaterError):
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, TenantLimitError):
        headers.update((name.decode(), value.decode()) for name, value in error.headers)
    if isinstance(error, UnauthorizedError):
        headers["www-authenticate"] = "Bearer"
    body = json.dumps({"error": str(error), "type": type(error).__name__}).encode()
    headers["content-length"] = str(len(body))
    return status, body, headers
