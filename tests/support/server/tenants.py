"""A keys file, and a server of completions behind the real middleware with the tenants of that file."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from support.server.rig import NAMES, Rig

from peanut_serve.tenants.visits import Tenants, may_use
from peanut_serve.tenants.watched import WatchedKeys
from peanut_serve.web.connections import bind, serve_on
from peanut_serve.web.middleware import VariantMiddleware


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


OPERATOR_KEY = "a key of --api-key"


def token_of(name: str) -> str:
    """The key of a tenant of these tests."""
    return f"peanut_the-token-of-{name}"


def entry(name: str, **fields: Any) -> dict[str, Any]:
    """An entry of a keys file."""
    return {"name": name, "sha256": hashlib.sha256(token_of(name).encode()).hexdigest(), **fields}


def write_keys(file: Path, *entries: dict[str, Any]) -> Path:
    """A keys file, that appears at once."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"keys": entries}))
    new.chmod(0o600)
    new.replace(file)
    return file


def tenants_of(file: Path, most_waiting: int = 1024, **more: Any) -> Tenants:
    """The tenants of a file."""
    return Tenants(WatchedKeys(file, **more), most_waiting, **more)


@asynccontextmanager
async def serving_tenants(rig: Rig, tenants: Tenants, go_on: asyncio.Event | None = None) -> AsyncIterator[str]:
    """Serve over HTTP in the running loop, as vLLM would: the address. Streams do not end before `go_on` is set."""

    async def complete(request: Request) -> Response:
        body = await request.json()
        text = (await rig.engine.generate())[:8]
        choice = {"index": 0, "finish_reason": "stop"}
        if not body.get("stream"):
            message = {"message": {"role": "assistant", "content": text}}
            return JSONResponse({"id": "1", "object": "chat.completion", "choices": [{**choice, **message}]})
        chunk = {"id": "1", "object": "chat.completion.chunk", "choices": [{**choice, "delta": {"content": text}}]}

        async def events() -> AsyncIterator[str]:
            yield f"data: {json.dumps(chunk)}\n\n"
            if go_on is not None:
                await go_on.wait()
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def models(_: Request) -> Response:
        cards = [{"id": name, "object": "model"} for name in NAMES if may_use(name)]
        return JSONResponse({"object": "list", "data": cards})

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(REGISTRY), media_type="text/plain")

    routes = [
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/metrics", metrics),
    ]
    admit = lambda request: None  # noqa: E731
    app: Any = VariantMiddleware(Starlette(routes=routes), lambda: rig.server, admit, [OPERATOR_KEY], tenants=tenants)
    listener = bind("127.0.0.1", 0)
    task = asyncio.create_task(serve_on(app, listener))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
