"""A `peanut-serve` for tests: one variant is resident, a swap takes a moment, answers tell who gave them.

    python fake_server.py --swap SECONDS --journal FILE --port PORT --admin-port PORT

Other options are those of a real one, and ignored.

Variants: base, v0 to v9, and `prod`, which is another name of v0. The journal gets a line for each event. Answers
also have token ids, which follow from the weights and the prompt: see `said`.
"""

import argparse
import asyncio
import json
import os
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

sys.path += [str(Path(__file__).parents[2]), str(Path(__file__).parents[3])]  # when it runs as a program
from support.fleet.fake_admin import NAMES, FakeAdmin
from support.fleet.fake_releases import VERBS, FakeReleases

__all__ = ["NAMES"]  # name -> digest

METRICS = """# HELP peanut_ready 1 while requests can be answered
# TYPE peanut_ready gauge
peanut_ready 1.0
# HELP peanut_requests_total requests that ended
# TYPE peanut_requests_total counter
peanut_requests_total{outcome="answered",variant="v\\"1"} 3.0
"""


def said(digest: str, prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that the weights of a variant answer a prompt with."""
    return [zlib.crc32(f"{digest} {list(prompt)} {number}".encode()) for number in range(count)]


class FakeServer:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.active, self.lock = options, "base", asyncio.Lock()
        self.admin = FakeAdmin(options.journal.parent, options.state)
        self.releases = FakeReleases(self.admin)
        self.lives = True

    def note(self, event: str) -> None:
        with self.options.journal.open("a") as journal:
            print(os.getpid(), event, file=journal, flush=True)

    async def health(self, _: Request) -> Response:
        return Response(status_code=200 if self.lives else 503)

    async def engine(self, _: Request) -> Response:
        sizes = {"host_cache_bytes": 10, "host_cache_limit": 100, "restarts": 0}
        facts = {"state": "serving" if self.lives else "failed", "swap_seconds": {}, "detail": None, **sizes}
        return JSONResponse({"active": self.active, "digest": self.active, **facts})

    async def metrics(self, _: Request) -> Response:
        return Response(METRICS, media_type="text/plain")

    async def change(self, request: Request) -> Response:
        name, verb = request.path_params.get("name"), request.path_params.get("verb", "unregister")
        body = json.loads(await request.body() or b"null")
        if name is None:
            name, verb = body["name"], "register"
        self.note(f"{verb} {name}")
        if (self.options.journal.parent / "slow").exists():
            await asyncio.sleep(2)
        return self.admin.answer(verb, name, body)

    async def release(self, request: Request) -> Response:
        name, verb = request.path_params.get("name"), request.path_params.get("verb")
        if name is None:
            return JSONResponse(self.releases.all())
        if request.method == "GET":
            return self.admin.tell(lambda: self.releases.find(name))
        assert verb in VERBS
        self.note(f"release {verb} {name}")
        body = json.loads(await request.body() or b"null") or {}
        return self.admin.tell(lambda: self.releases.make(verb, name, body))

    async def echo(self, request: Request) -> Response:
        """What came in, byte for byte, and an odd answer."""
        headers = {"x-body": (await request.body()).hex(), "x-query": request.url.query, "x-odd": "a, b;c"}
        headers["x-tenant"] = ",".join(request.headers.getlist("x-peanut-tenant"))
        return Response(bytes(range(256)), 418, headers | {"x-key": request.headers["authorization"]})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name} for name in NAMES]})

    async def usage(self, _: Request) -> Response:
        used = {"requests": 2, "prompt_tokens": 30, "generated_tokens": 4, "engine_seconds": 0.5}
        return JSONResponse({"since": "2026-01-02T00:00:00Z", "usage": [{"variant": "v1", "tenant": "one", **used}]})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        session = body.get("user") or request.headers.get("x-session")
        name = self.releases.answering(body["model"], session)
        digest = self.admin.current(name)
        if digest is None:
            return JSONResponse({"error": {"message": "no such variant"}}, 404)
        if self.releases.fails(name, digest):
            return JSONResponse({"error": {"message": "it is broken"}}, 500)
        async with self.lock:
            if digest != self.active:
                await asyncio.sleep(self.options.swap)
                self.active = digest
                self.note(f"swapped {digest}")
        tokens = said(digest, body.get("prompt", ()), body.get("max_tokens", 3))
        if body.get("stream"):
            return StreamingResponse(self.events(tokens), media_type="text/event-stream")
        facts = {"variant": self.active, "pid": os.getpid(), "choices": [{"token_ids": tokens}]}
        answer = JSONResponse(facts, headers={"x-peanut-variant": name, "x-peanut-digest": digest})
        if body.get("dies") and "died" not in self.options.journal.read_text():  # the first that is asked to
            self.note("died")
            self.lives = False
        if not self.lives:
            return Response(status_code=500)  # as vLLM's server, when its engine has gone
        if body.get("stuck") and "stuck" not in self.options.journal.read_text():
            return StreamingResponse(self.never_whole(bytes(answer.body)), headers=dict(answer.headers))
        return answer

    async def never_whole(self, body: bytes) -> AsyncIterator[bytes]:
        """The first request of all engines that asks for it gets a part of its answer, and no more."""
        yield body[:5]
        self.note("stuck")
        await asyncio.Event().wait()

    async def events(self, tokens: Sequence[int]) -> AsyncIterator[str]:
        try:
            for token in tokens:
                yield f'data: {{"choices": [{{"token_ids": [{token}]}}], "pid": {os.getpid()}}}\n\n'
                await asyncio.sleep(0.05)
            yield "data: [DONE]\n\n"
            self.note("finished")
        except asyncio.CancelledError:
            self.note("cancelled")
            raise

    def run(self) -> None:
        admin = Starlette(
            routes=[
                Route("/admin/v1/engine", self.engine),
                Route("/admin/v1/usage", self.usage),
                Route("/admin/v1/releases", self.release),
                Route("/admin/v1/releases/{name:path}/{verb}", self.release, methods=["POST"]),
                Route("/admin/v1/releases/{name:path}", self.release),
                Route("/admin/v1/variants", self.change, methods=["POST"]),
                Route("/admin/v1/variants/{name:path}/{verb}", self.change, methods=["POST"]),
                Route("/admin/v1/variants/{name:path}", self.change, methods=["DELETE"]),
                *self.admin.routes(),
            ]
        )
        config = uvicorn.Config(admin, port=self.options.admin_port, log_level="warning")
        threading.Thread(target=uvicorn.Server(config).run, daemon=True).start()
        app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/ready", self.health),
                Route("/metrics", self.metrics),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/tokenize", self.echo, methods=["POST"]),
            ]
        )
        uvicorn.run(app, port=self.options.port, log_level="warning")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--swap", type=float)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--admin-port", type=int)
    parser.add_argument("--state", type=Path)
    FakeServer(parser.parse_known_args()[0]).run()
