"""A `peanut-serve` for tests: one variant is resident, a swap takes a moment, answers tell who gave them.

    python fake_server.py --swap SECONDS --journal FILE --port PORT --admin-port PORT

Other options are those of a real one, and ignored.

Variants: base, v0 to v9, and `prod`, which is another name of v0. The journal gets a line for each event. Answers
also have token ids, which follow from the weights and the prompt: see `said`.
"""

import argparse
import asyncio
import os
import threading
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

NAMES = {"base": "base", "prod": "v0"} | {f"v{number}": f"v{number}" for number in range(10)}  # name -> digest


def said(digest: str, prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that the weights of a variant answer a prompt with."""
    return [zlib.crc32(f"{digest} {list(prompt)} {number}".encode()) for number in range(count)]


class FakeServer:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.active, self.lock = options, "base", asyncio.Lock()
        self.names = dict(NAMES)

    def note(self, event: str) -> None:
        with self.options.journal.open("a") as journal:
            print(os.getpid(), event, file=journal, flush=True)

    async def health(self, _: Request) -> Response:
        return Response()

    async def engine(self, _: Request) -> Response:
        return JSONResponse({"active": self.active, "digest": self.active})

    async def variants(self, _: Request) -> Response:
        return JSONResponse([{"name": name, "digest": digest} for name, digest in self.names.items()])

    async def change(self, request: Request) -> Response:
        """A rollback gives another digest at every engine."""
        name, verb = request.path_params["name"], request.path_params.get("verb", "removed")
        if name not in self.names:
            return JSONResponse({"error": {"type": "UnknownVariantError", "message": f"no {name}"}}, 404)
        self.note(f"{verb} {name}")
        if verb == "rollback":
            self.names[name] = f"{name}-{os.getpid()}"
        return JSONResponse({"name": name, "digest": self.names[name], "pid": os.getpid()})

    async def echo(self, request: Request) -> Response:
        """What came in, byte for byte, and an odd answer."""
        headers = {"x-body": (await request.body()).hex(), "x-query": request.url.query, "x-odd": "a, b;c"}
        return Response(bytes(range(256)), 418, headers | {"x-key": request.headers["authorization"]})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        digest = NAMES.get(body["model"])
        if digest is None:
            return JSONResponse({"error": {"message": "no such variant"}}, 404)
        async with self.lock:
            if digest != self.active:
                await asyncio.sleep(self.options.swap)
                self.active = digest
                self.note(f"swapped {digest}")
        tokens = said(digest, body.get("prompt", ()), body.get("max_tokens", 3))
        if body.get("stream"):
            return StreamingResponse(self.events(tokens), media_type="text/event-stream")
        answer = JSONResponse({"variant": self.active, "pid": os.getpid(), "choices": [{"token_ids": tokens}]})
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
                Route("/admin/v1/variants", self.variants),
                Route("/admin/v1/variants/{name:path}/{verb}", self.change, methods=["POST"]),
                Route("/admin/v1/variants/{name:path}", self.change, methods=["DELETE"]),
            ]
        )
        config = uvicorn.Config(admin, port=self.options.admin_port, log_level="warning")
        threading.Thread(target=uvicorn.Server(config).run, daemon=True).start()
        app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/completions", self.complete, methods=["POST"]),
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
    FakeServer(parser.parse_known_args()[0]).run()
