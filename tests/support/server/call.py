"""One HTTP request to the middleware in front of a fake engine, and its response."""

import asyncio
import json
from collections.abc import Callable, Sequence

from support.server.rig import Rig

from peanut_serve.tenants.visits import Tenants
from peanut_serve.web.middleware import VariantMiddleware
from peanut_serve.web.request_body import Bodies, ClientLimits


class Call:
    """One HTTP request to the middleware, and its response."""

    def __init__(
        self,
        rig: Rig,
        path: str,
        body: object = None,
        method: str = "POST",
        keys: Sequence[str] = (),
        limits: ClientLimits | None = None,
        tenants: Tenants | None = None,
        bodies: Bodies | None = None,
        **headers: str,
    ) -> None:
        self.rig, self.sent, self.gone = rig, [], asyncio.Event()
        self.body = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.scope = {"type": "http", "method": method, "path": path, "headers": []}
        self.scope["headers"] += [(key.replace("_", "-").encode(), text.encode()) for key, text in headers.items()]
        self.is_read = False
        self.admitted: list[str | None] = []
        admit = lambda one: self.admitted.append(one and one.name)  # noqa: E731
        middleware = VariantMiddleware(self._app, lambda: rig.server, admit, keys, limits or ClientLimits(), tenants)
        if bodies is not None:  # those of several requests have one limit
            middleware._bodies = bodies
        self.reads, self.uploads = asyncio.Event(), asyncio.Event()  # whether the client does
        self.reads.set()
        self.uploads.set()
        self.task = asyncio.create_task(middleware(self.scope, self._receive, self._send))

    async def _receive(self) -> dict:
        if self.is_read:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        await self.uploads.wait()
        self.is_read = True
        return {"type": "http.request", "body": self.body}

    async def _send(self, message: dict) -> None:
        await self.reads.wait()
        self.sent.append(message)

    async def _app(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Stands for vLLM: the answer identifies the weights that the engine used."""
        self.scope = scope
        assert (await receive())["body"] == self.body
        kind = b"text/event-stream" if scope["path"] == "/v1/chat/completions" else b"text/plain"
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        if scope["path"] == "/v1/chat/completions":
            await send(start)
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        answer = await self.rig.engine.generate()
        if scope["path"] != "/v1/chat/completions":
            await send(start)
        await send({"type": "http.response.body", "body": answer.encode()})

    async def answer(self) -> tuple[int, str]:
        await self.task
        return self.sent[0]["status"], b"".join(message["body"] for message in self.sent[1:]).decode()

    async def refusal(self) -> tuple[int, str, str | None]:
        """Status, error type and Retry-After."""
        status, text = await self.answer()
        error = json.loads(text)["error"]
        assert (error["code"], error["param"]) == (status, "model")
        return status, error["type"], self.header("retry-after")

    def header(self, name: str) -> str | None:
        return dict(self.sent[0]["headers"]).get(name.encode(), b"").decode() or None
