"""A served admin API whose control is a fake: the real one needs an engine, which no unit test has."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import datetime, timezone

from fastapi import FastAPI

from converters.errors import HubError
from peanut_serve.errors import (
    EngineDownError,
    QueueFullError,
    SwapError,
    UnknownVariantError,
    VariantError,
    VariantInUseError,
    VariantNameError,
)
from peanut_serve.settings.tls import Certificate
from peanut_serve.web.connections import bind, serve_on
from peanut_serve.web.schema import EngineStatus, SwapStatus, VariantState, VariantStatus, VariantTraffic

KEY = "schlüssel"

REFUSALS = {
    "in-use": (VariantInUseError("in-use has 3 requests"), 409),
    "taken": (VariantNameError("taken is taken"), 409),
    "broken": (VariantError("θ is [not] finite"), 422),
    "hub": (HubError("no such repository"), 422),
    "swap": (SwapError("out of memory\nrolled back"), 500),
    "bug": (KeyError("bug"), 500),
    "full": (QueueFullError("1000 requests wait", retry_after=3), 429),
    "down": (EngineDownError("the engine restarts", retry_after=20), 503),
}


class FakeControl:
    """Variants that are no more than their status; those of REFUSALS refuse to be activated."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.names = ["base", "user/name", *REFUSALS]

    async def variants(self) -> list[VariantStatus]:
        asyncio.get_running_loop()  # raises in a thread
        return [self.variant(name) for name in self.names]

    def variant(self, name: str) -> VariantStatus:
        if name not in self.names:
            raise UnknownVariantError(f"there is no variant {name!r}")
        return VariantStatus(
            name=name,
            kind="base" if name == "base" else "adapter",
            state=VariantState.ACTIVE if name == "base" else VariantState.READY,
            digest="d1" * 20,
            previous=["d0" * 20],
            source=f"/srv/{name}[1]",
            host_bytes=2_500_000_000,
            pinned=name == "base",
            running=1,
            waiting=2,
            requests=30,
            last_used=datetime(2025, 1, 2, tzinfo=timezone.utc),
            swaps=4,
            last_swap_seconds=0.125,
            error=None,
        )

    def engine(self) -> EngineStatus:
        return EngineStatus(
            state="serving",
            active="base",
            digest="d1" * 20,
            restarts=0,
            host_cache_bytes=5_000_000,
            host_cache_limit=20_000_000_000,
            swap_seconds={"drain": 0.5, "apply": 0.25},
            detail=None,
        )

    def swaps(self) -> list[SwapStatus]:
        return [
            SwapStatus(
                number=2,
                at=datetime(2025, 1, 2, tzinfo=timezone.utc),
                cause="overdue",
                before="base",
                before_digest="d1" * 20,
                target="swap",
                digest="d2" * 20,
                running=1,
                waiting={"swap": 2},
                longest_wait=10.5,
                outcome="rolled_back",
                error="the swap failed and was rolled back: <out of memory>",
                seconds={"quiesce": 0.5, "apply": 0.25, "roll_back": 0.75},
                tensors=12,
                nbytes=2_500_000_000,
            )
        ]

    async def traffic(self) -> list[VariantTraffic]:
        return [
            VariantTraffic(
                name=name,
                answered=28,
                failed=2,
                outcomes={"200": 28, "503": 2},
                prompt_tokens=1000,
                generated_tokens=2000,
                p50_seconds=0.5,
                p95_seconds=1.25,
            )
            for name in self.names
        ]

    async def register(self, name: str, source: str) -> VariantStatus:
        self.calls.append(("register", name, source))
        if name in self.names:
            raise VariantNameError(f"{name} is taken")
        self.names.append(name)
        return self.variant(name)

    async def unregister(self, name: str, drain: bool) -> None:
        self.calls.append(("unregister", name, drain))
        self.names.remove(self.variant(name).name)

    async def activate(self, name: str) -> VariantStatus:
        self.calls.append(("activate", name))
        if name in REFUSALS:
            raise REFUSALS[name][0]
        return self.variant(name)

    async def reload(self, name: str) -> VariantStatus:
        self.calls.append(("reload", name))
        return self.variant(name)

    async def rollback(self, name: str, digest: str | None, hold: bool) -> VariantStatus:
        self.calls.append(("rollback", name, digest, hold))
        return self.variant(name)

    async def preload(self, name: str) -> VariantStatus:
        self.calls.append(("preload", name))
        return self.variant(name)

    async def pin(self, name: str, pinned: bool) -> VariantStatus:
        self.calls.append(("pin", name, pinned))
        return self.variant(name)


@contextmanager
def serving_app(app: FastAPI, certificate: Certificate | None = None) -> Iterator[str]:
    """Serve `app` in a thread, as it is served in vLLM's loop; its URL."""
    listener = bind("127.0.0.1", 0)
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()

    async def serve() -> None:
        task = asyncio.create_task(serve_on(app, listener, certificate))
        begun.set_result((asyncio.get_running_loop(), task))
        await asyncio.wait([task])

    # `run` ends the tasks that are left, too: destroyed later, each logs wherever garbage is collected just then
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    loop, task = begun.result(timeout=30)
    try:
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)
