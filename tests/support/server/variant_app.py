"""The completions of a `VariantServer` with a fake engine, behind the real middleware, as vLLM serves them."""

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from support.server.fake_engine import FakeEngine

from peanut_serve.swapping.server import VariantServer
from peanut_serve.web.console.data_route import App, DataRoute
from peanut_serve.web.middleware import VariantMiddleware

_KEY = "key for completions"


def data_route(server: VariantServer, engine: FakeEngine) -> DataRoute:
    """Answers are words from the weights that gave them, one after another."""

    async def events(body: dict) -> AsyncIterator[str]:
        for word in ("Weights ", (await engine.generate(body["messages"][0]["content"]))[:8], " speaking."):
            await asyncio.sleep(0.01)
            yield f"data: {json.dumps({'choices': [{'delta': {'content': word}}]})}\n\n"
        yield "data: [DONE]\n\n"

    async def complete(request: Request) -> StreamingResponse:
        return StreamingResponse(events(await request.json()), media_type="text/event-stream")

    inner = Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"])])
    app: App = VariantMiddleware(inner, lambda: server, lambda admitted: None, [_KEY])
    return DataRoute(app, _KEY)
