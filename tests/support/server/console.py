"""A served console whose control and completions are given; and completions that tell who gave them."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from support.server.admin import KEY, serving_app

from peanut_serve.web.admin import admin_app
from peanut_serve.web.console.app import ConsoleHost, add_console
from peanut_serve.web.console.data_route import DataRoute
from peanut_serve.web.schema import Control

DATA_KEY = "key for completions"


class Completions:
    """A route for completions like vLLM's: the answer repeats the prompt, and names the variant.

    Attributes:
        asked: the bodies of requests.
        broken: variants whose answers break off with an error.
        endless: variants whose answers do not end.
        stopped: answers that were given up.
        refused: variants that get a 500.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []
        self.broken: set[str] = set()
        self.refused: set[str] = set()
        self.endless: set[str] = set()
        self.stopped = 0
        paths = ("/v1/chat/completions", "/v1/completions")
        self.app = Starlette(routes=[Route(path, self.complete, methods=["POST"]) for path in paths])

    @property
    def route(self) -> DataRoute:
        return DataRoute(self.app, DATA_KEY)

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        if request.headers.get("authorization") != f"Bearer {DATA_KEY}":
            return JSONResponse({"error": {"message": "the API key is wrong"}}, 401)
        if body["model"] in self.refused:
            return JSONResponse({"error": {"message": f"the swap to {body['model']} failed: <b>no memory</b>"}}, 500)
        headers = {"x-peanut-variant": body["model"], "x-peanut-digest": f"{body['model']:0<40}"}
        headers["x-peanut-path"] = "base" if body["model"] == "base" else "merged"
        return StreamingResponse(self.events(body), media_type="text/event-stream", headers=headers)

    async def events(self, body: dict) -> AsyncIterator[str]:
        is_chat = "messages" in body
        prompt = body["messages"][0]["content"] if is_chat else body["prompt"]
        try:
            while body["model"] in self.endless:
                yield 'data: {"choices": [{"delta": {"content": "more "}}]}\n\n'
                await asyncio.sleep(0.01)
        except (asyncio.CancelledError, GeneratorExit):  # while it waits, or while it is read
            self.stopped += 1
            raise
        for count, word in enumerate(["I", " am ", body["model"], ". ", prompt]):
            if count == 2 and body["model"] in self.broken:
                yield 'data: {"error": {"message": "aborted by a swap"}}\n\n'
                return
            choice = {"delta": {"content": word}} if is_chat else {"text": word}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"


@contextmanager
def serving_console(control: Control, route: DataRoute | None = None, hosts: tuple[str, ...] = ()) -> Iterator[str]:
    """Serve the admin API with a console in a thread; its URL."""
    app = admin_app(control, KEY)
    add_console(app, ConsoleHost(control, KEY, 8001, hosts, route=route))
    with serving_app(app) as url:
        yield url


@contextmanager
def logged_in(url: str, key: str = KEY) -> Iterator[httpx.Client]:
    """A browser with a session, that sends what the page's script sends."""
    with httpx.Client(base_url=url, headers={"Origin": url}, timeout=30) as client:
        done = client.post("/console/login", data={"key": key})
        assert done.status_code == 303, done.text
        page = client.get("/console").text
        client.headers["X-Console-Token"] = page.split('name="console-token" content="')[1].split('"')[0]
        yield client
