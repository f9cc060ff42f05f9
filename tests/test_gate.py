"""Requests meet weights: each is answered with those of its variant, whatever fails and whoever goes away.

The engine is a fake that tells which weights it computed an answer with; see `fake_engine.py`.
"""

import asyncio
import json
import random
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import pytest
from fake_engine import FakeEngine, FaultError, identity
from prometheus_client import REGISTRY
from test_swap import Weights, prepared, weights_in

from peanut_serve import swap_driver
from peanut_serve.adapter_roots import AdapterRoots
from peanut_serve.control import VariantState
from peanut_serve.host_weights import HostMemoryError
from peanut_serve.serving_errors import (
    EngineDownError,
    QueueFullError,
    SwapError,
    UnknownVariantError,
    VariantError,
    VariantInUseError,
)
from peanut_serve.swap_settings import SwapSettings
from peanut_serve.variant_control import VariantControl
from peanut_serve.variant_middleware import VariantMiddleware
from peanut_serve.variant_server import VariantServer
from peanut_serve.variant_store import VariantStore

NAMES = ("base", "v1", "v2", "v3")
SIZE = 12288  # bytes of a variant on the host


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    found = weights_in(tmp_path_factory.mktemp("serving"))
    (found.tasks / "broken.safetensors").write_bytes(b"no")
    return found


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@dataclass
class Rig:
    """A server and its engine."""

    engine: FakeEngine
    server: VariantServer
    expected: dict[str, str]
    actives: list[str] = field(default_factory=list)

    async def ask(self, name: str, prompt: str = "a prompt that all ask") -> None:
        """One request: it has to get its variant's weights."""
        task = asyncio.current_task()
        assert task is not None
        async with self.server.serving(name, task.cancel) as admitted:
            assert admitted.version.digest == self.server.swapper.active.version.digest == self.actives[-1]
            assert await self.engine.generate(prompt) == self.expected[name]

    async def asking(self, name: str) -> "asyncio.Task[None]":
        """A request that waits for its weights, or runs."""
        before = self.waiting + len(self.server.gate.running)
        task = asyncio.create_task(self.ask(name))
        await until(lambda: self.waiting + len(self.server.gate.running) > before or task.done())
        return task

    @property
    def waiting(self) -> int:
        return sum(len(queue.arrivals) for queue in self.server.gate.queues())

    @property
    def swaps(self) -> int:
        return len(self.engine.applied) - 3  # those of the self-test


RunRig = Callable[..., None]


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    """Runs a test on a server of its own."""
    monkeypatch.setattr(swap_driver, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(swap_driver, "_LOOK_SECONDS", 0.01)

    def call(test: Callable[[Rig], Awaitable[None]], **options: object) -> None:
        async def run() -> None:
            choices = {"roots": (str(weights.tasks),), "min_dwell": 0, "max_wait": 0, **options}
            settings = SwapSettings(mode="merged", state=Path(mkdtemp(dir=tmp_path)), **choices)
            engine, actives = FakeEngine(weights.base), []
            model, swapper, base_weights = await prepared(engine, weights.base)
            server = VariantServer(
                settings, engine, model, swapper, base_weights, ["base"], AdapterRoots(settings.roots),
                VariantStore(settings.state), None, actives.append,
            )  # fmt: skip
            await server.start()
            expected = {name: identity(found) for name, found in weights.expected.items()}
            expected["new"] = expected["v1"]  # what tests register
            try:
                await test(Rig(engine, server, expected, actives))
                assert engine.violations == []
            finally:
                server.stop()
                server.cache.close()

        asyncio.run(asyncio.wait_for(run(), 60))

    return call


def test_everybody_gets_the_weights_asked_for(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        names = list(NAMES * 20)
        random.Random(0).shuffle(names)
        await asyncio.gather(*map(rig.ask, names))
        for name in names:
            await rig.ask(name)
        assert rig.server.usage["v1"].requests == 40

    run_rig(test)


def test_requests_of_a_variant_go_together(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        tasks = [await rig.asking(name) for name in NAMES * 10]
        rig.engine.go.set()
        await asyncio.gather(*tasks)
        assert rig.swaps <= len(NAMES)

    run_rig(test, max_wait=60)


def test_who_goes_away_gives_a_place_to_another(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        running = await rig.asking("base")
        waiting = [await rig.asking("v1"), await rig.asking("v2")]
        with pytest.raises(QueueFullError, match="2 requests wait already, and --max-queue is 2") as full:
            await rig.ask("v1")
        assert full.value.retry_after >= 1
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        other = await rig.asking("v3")
        assert (rig.waiting, rig.server.places.taken, other.done()) == (2, 2, False)
        rig.engine.go.set()
        await asyncio.gather(running, waiting[1], other)
        assert (rig.waiting, rig.server.places.taken, rig.server.in_flight.total()) == (0, 0, 0)

    run_rig(test, max_queue=2)


@pytest.mark.parametrize("options", [{"drain": "abort"}, {"drain_timeout": 0.01}])
def test_a_swap_ends_what_runs_too_long(run_rig: RunRig, options: dict) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        running = await rig.asking("base")
        waiting = await rig.asking("v1")
        with pytest.raises(asyncio.CancelledError):
            await running
        rig.engine.go.set()
        await waiting

    run_rig(test, **options)


def test_a_swap_waits_for_the_end_of_what_it_ends(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        async def slow() -> None:
            ended = asyncio.Event()
            async with rig.server.serving("base", ended.set):
                rig.engine.running += 1  # the engine is used against the rules if it is paused meanwhile
                await ended.wait()
                for _ in range(100):
                    await asyncio.sleep(0)
                rig.engine.running -= 1

        await asyncio.gather(slow(), rig.ask("v1"))

    run_rig(test, drain="abort")


def test_a_swap_that_fails_costs_its_own_requests_only(run_rig: RunRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_driver, "_FIRST_RETRY", 60.0)

    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        rig.engine.fail("apply", "half", 1)
        running = await rig.asking("base")
        tasks = [await rig.asking(name) for name in ("v1", "v1", "base", "v2")]
        rig.engine.go.set()
        ended = await asyncio.gather(running, *tasks, return_exceptions=True)
        assert [type(end).__name__ for end in ended] == ["NoneType", "SwapError", "SwapError", "NoneType", "NoneType"]
        before = rig.swaps
        with pytest.raises(SwapError, match=r"halfway; it is tried again after \d+ s, or when it is reloaded"):
            await rig.ask("v1")
        assert rig.swaps == before
        control = VariantControl(rig.server)
        assert control.variant("v1").state is VariantState.FAILED
        await control.reload("v1")
        await rig.ask("v1")
        assert control.variant("v1").state is VariantState.ACTIVE

    run_rig(test)


def test_an_engine_that_dies_while_requests_wait(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("v1")
        rig.engine.go.clear()
        running = await rig.asking("v1")
        waiting = [await rig.asking("v2"), await rig.asking("v1")]
        rig.engine.die()
        assert not rig.server.is_ready
        with pytest.raises(FaultError):
            await running
        await asyncio.gather(*waiting)
        assert (rig.server.swapper.restarts, rig.server.is_ready) == (1, True)

    run_rig(test, max_wait=60)


@pytest.mark.parametrize("how", ["raise", "wrong"])
def test_an_engine_that_does_not_start_again_is_tried_until_it_does(run_rig: RunRig, how: str) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.fail("restart", how, 1, 2)
        rig.engine.go.clear()
        running = await rig.asking("base")
        waiting = await rig.asking("v1")
        rig.engine.die()
        ended = await asyncio.gather(running, waiting, return_exceptions=True)
        assert [type(end) for end in ended] == [FaultError, EngineDownError]
        with pytest.raises(EngineDownError, match="the engine is down: .*starting it again failed"):
            await rig.ask("base")
        await until(lambda: rig.server.is_ready)
        await rig.ask("v1")
        assert rig.server.swapper.restarts == 3

    run_rig(test, max_wait=60)


def test_a_server_that_stops(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        running = await rig.asking("base")
        waiting = await rig.asking("v1")
        rig.server.stop()
        for refused in (waiting, rig.ask("base"), rig.server.activate("v1")):
            with pytest.raises(EngineDownError, match="the server stops"):
                await refused
        rig.engine.go.set()
        await running
        assert not rig.server.is_ready

    run_rig(test, max_wait=60)


@pytest.mark.parametrize("steps", range(5))
def test_a_server_that_stops_just_when_something_happens(run_rig: RunRig, steps: int) -> None:
    """`asyncio.wait_for` may lose a cancellation then. An engine that is shut down must not be started again."""

    async def test(rig: Rig) -> None:
        await asyncio.sleep(0.001)
        rig.server.driver.wake()
        for _ in range(steps):
            await asyncio.sleep(0)
        rig.server.stop()
        rig.engine.die()
        await asyncio.sleep(0.05)
        assert rig.server.swapper.restarts == 0

    run_rig(test)


def test_activate(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        control = VariantControl(rig.server)
        assert (await control.activate("v1")).state is VariantState.ACTIVE
        assert identity(rig.engine.weights) == rig.expected["v1"]
        assert rig.server.catalogue.records.active == "v1"
        rig.engine.fail("apply")
        swaps = rig.engine.calls.count("apply")
        with pytest.raises(SwapError, match="rolled back"):
            await control.activate("v2")
        await rig.ask("v1")
        assert rig.engine.calls.count("apply") == swaps + 2  # there and back, and no second try
        assert rig.server.catalogue.records.active == "v1"
        await control.activate("v2")
        for name, error in (("none", UnknownVariantError), ("broken", VariantError)):
            with pytest.raises(error):
                await control.activate(name)
        assert control.engine().active == "v2"

    run_rig(test)


def test_pinned_weights_stay(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        control = VariantControl(rig.server)
        await rig.ask("v2")
        await rig.ask("base")
        await rig.ask("v3")
        await rig.ask("base")
        assert [control.variant(name).host_bytes > 0 for name in NAMES] == [False, True, False, True]  # v1 is pinned
        await control.pin("v2", True)
        with pytest.raises(HostMemoryError, match="unpin a variant"):
            await rig.ask("v3")
        await control.pin("v2", False)
        await rig.ask("v3")
        assert [control.variant(name).host_bytes > 0 for name in NAMES] == [False, True, False, True]

    run_rig(test, host_cache=2 * SIZE, pin=("v1",))


def test_weights_that_are_needed_are_held(run_rig: RunRig) -> None:
    """Those that requests wait for, and the active ones, to go back to."""

    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        tasks = [await rig.asking("base"), await rig.asking("v1")]
        for name in ("v2", "v3", "v2"):
            await rig.server.current(name)  # takes the other place
        rig.engine.go.set()
        await asyncio.gather(*tasks)
        for name in ("v3", "v2"):
            await rig.server.current(name)
        rig.engine.fail("apply")
        with pytest.raises(SwapError, match="the swap failed and was rolled back"):
            await rig.ask("v2")
        assert identity(rig.engine.weights) == rig.expected["v1"]

    run_rig(test, host_cache=2 * SIZE, max_wait=60)


def test_what_is_preloaded(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        states = [VariantControl(rig.server).variant(name).state for name in ("v1", "v2")]
        assert states == [VariantState.READY, VariantState.REGISTERED]

    run_rig(test, preload=("v1",))
    with pytest.raises(VariantError, match="broken cannot be served"):
        run_rig(test, preload=("broken",))


def test_variants_come_and_go(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        control = VariantControl(rig.server)
        with pytest.raises(VariantError):
            await control.register("new", "broken")
        assert "new" not in rig.server.catalogue.names()
        assert (await control.register("new", "v1")).state is VariantState.READY
        rig.engine.go.clear()
        running = asyncio.create_task(rig.ask("new"))
        await until(lambda: rig.engine.running == 1)
        with pytest.raises(VariantInUseError, match="new has 1 requests"):
            await control.unregister("new", drain=False)
        removing = asyncio.create_task(control.unregister("new", drain=True))
        await until(lambda: "new" not in rig.server.catalogue.names())
        with pytest.raises(UnknownVariantError):
            await rig.ask("new")
        assert not removing.done()
        rig.engine.go.set()
        await asyncio.gather(running, removing)

    run_rig(test)


def test_a_name_in_two_folders_hinders_no_other(run_rig: RunRig, weights: Weights, tmp_path: Path) -> None:
    shutil.copytree(weights.tasks / "v1", tmp_path / "more" / "v1")

    async def test(rig: Rig) -> None:
        listed = [one.name for one in VariantControl(rig.server).variants()]
        assert listed == ["base", "broken", "v1", "v2", "v3"]
        await rig.ask("v2")

    run_rig(test, roots=(str(weights.tasks), str(tmp_path / "more")))


def test_what_is_counted(run_rig: RunRig) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    async def test(rig: Rig) -> None:
        def values() -> list[float]:
            return [
                value("peanut_swaps_total", variant="v1", outcome="done"),
                value("peanut_swaps_total", variant="v1", outcome="failed"),
                value("peanut_rollbacks_total"),
                value("peanut_engine_restarts_total"),
                value("peanut_evaluation_seconds_count"),
                value("peanut_swap_seconds_count", phase="apply"),
                value("peanut_queue_seconds_count", variant="v1"),
            ]

        def change() -> list[float]:
            nonlocal before
            before, old = values(), before
            return [new - then for new, then in zip(before, old, strict=True)]

        before = values()
        await rig.ask("v1")
        assert change() == [1, 0, 0, 0, 1, 1, 1]
        await rig.ask("base")
        rig.engine.fail("apply")
        with pytest.raises(SwapError):
            await rig.ask("v1")
        assert change() == [0, 1, 1, 0, 0, 1, 0]
        rig.server.driver.forgive(str(rig.server.catalogue.find("v1").record.digest))
        rig.engine.fail("apply", "die")
        with pytest.raises(SwapError):
            await rig.ask("v1")
        assert change() == [0, 1, 1, 1, 0, 0, 0]
        assert value("peanut_host_cache_bytes") == rig.server.cache.nbytes > 0
        assert value("peanut_ready") == 1

    run_rig(test)


class Call:
    """One HTTP request to the middleware, and what it was answered."""

    def __init__(self, rig: Rig, path: str, body: object = None, method: str = "POST", **headers: str) -> None:
        self.rig, self.sent, self.gone = rig, [], asyncio.Event()
        self.body = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.scope = {"type": "http", "method": method, "path": path, "headers": []}
        self.scope["headers"] += [(key.replace("_", "-").encode(), text.encode()) for key, text in headers.items()]
        self.is_read = False
        self.admitted: list[str | None] = []
        middleware = VariantMiddleware(
            self._app, lambda: rig.server, lambda one: self.admitted.append(one and one.name)
        )
        self.task = asyncio.create_task(middleware(self.scope, self._receive, self._send))

    async def _receive(self) -> dict:
        if self.is_read:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        self.is_read = True
        return {"type": "http.request", "body": self.body}

    async def _send(self, message: dict) -> None:
        self.sent.append(message)

    async def _app(self, scope: dict, receive: Callable, send: Callable) -> None:
        """What vLLM is: the answer is what the engine has computed with."""
        assert (await receive())["body"] == self.body
        kind = b"text/event-stream" if scope["path"] == "/stream" else b"text/plain"
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        if scope["path"] == "/stream":
            await send(start)
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        answer = await self.rig.engine.generate()
        if scope["path"] != "/stream":
            await send(start)
        await send({"type": "http.response.body", "body": answer.encode()})

    async def answer(self) -> tuple[int, str]:
        await self.task
        return self.sent[0]["status"], b"".join(message["body"] for message in self.sent[1:]).decode()

    async def refusal(self) -> tuple[int, str, str | None]:
        """Status, kind and Retry-After."""
        status, text = await self.answer()
        error = json.loads(text)["error"]
        assert (error["code"], error["param"]) == (status, "model")
        return status, error["type"], self.header("retry-after")

    def header(self, name: str) -> str | None:
        return dict(self.sent[0]["headers"]).get(name.encode(), b"").decode() or None


def test_a_request_says_whose_weights_it_got(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        for path in ("/v1/completions", "/stream", "/a/route/of/a/later/vllm"):
            for name in ("v1", "base", "v2"):
                call = Call(rig, path, {"model": name, "n": 1}, x_request_id="mine")
                status, text = await call.answer()
                assert (status, text.removeprefix("data: 1\n\n")) == (200, rig.expected[name])
                digest = rig.server.catalogue.find(name).version.digest
                found = [call.header(f"x-{header}") for header in ("peanut-variant", "peanut-digest", "request-id")]
                assert (found, call.admitted) == ([name, digest, "mine"], [name])
        for body in ({}, b"", {"model": None}, {"model": ""}, []):  # as vLLM: whatever it serves
            call = Call(rig, "/v1/completions", body)
            assert await call.answer() == (200, rig.expected["base"])
            given = dict(call.scope["headers"])[b"x-request-id"].decode()
            assert call.header("x-request-id") == given != ""

    run_rig(test)


def test_what_needs_no_weights_does_not_wait(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("v1")
        for method, path in (("POST", "/tokenize"), ("POST", "/v1/messages/count_tokens"), ("GET", "/v1/models")):
            call = Call(rig, path, {"model": "none"}, method)
            assert await call.answer() == (200, rig.expected["v1"])
            assert (call.admitted, call.header("x-peanut-variant")) == ([None], None)
        sent: list[dict] = []
        middleware = VariantMiddleware(Call._app, lambda: rig.server, lambda one: None)

        async def send(message: dict) -> None:
            sent.append(message)

        await middleware({"type": "websocket", "path": "/v1/realtime"}, lambda: asyncio.sleep(0), send)
        assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]

    run_rig(test)


def test_refusals(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        unknown = {"variant": "unknown", "outcome": "refused"}
        before = REGISTRY.get_sample_value("peanut_requests_total", unknown) or 0
        for body, expected in (
            ({"model": "none"}, (404, "UnknownVariantError", None)),
            ({"model": "../v1"}, (404, "UnknownVariantError", None)),
            ({"model": "broken"}, (422, "VariantError", None)),
            ({"model": 5}, (400, "RequestBodyError", None)),
            (b"--multipart", (400, "RequestBodyError", None)),
            (b"[" * 100_000, (400, "RequestBodyError", None)),
        ):
            assert await Call(rig, "/v1/completions", body).refusal() == expected
        after = REGISTRY.get_sample_value("peanut_requests_total", unknown)
        assert after == before + 5  # no series for a name that a client made up
        rig.engine.fail("apply")
        assert await Call(rig, "/v1/completions", {"model": "v1"}).refusal() == (500, "SwapError", None)
        rig.engine.go.clear()
        running = Call(rig, "/v1/completions")
        await until(lambda: rig.engine.running == 1)
        waiting = [Call(rig, "/v1/completions", {"model": "v2"}) for _ in range(2)]
        await until(lambda: rig.waiting == 1 and any(call.task.done() for call in waiting))
        status, kind, retry = await next(call for call in waiting if call.task.done()).refusal()
        assert (status, kind, int(retry or 0) > 0) == (429, "QueueFullError", True)
        rig.server.stop()
        assert await next(call for call in waiting if call.sent == []).refusal() == (503, "EngineDownError", "5")
        rig.engine.go.set()
        assert (await running.answer())[0] == 200

    run_rig(test, max_queue=1, max_wait=60)


def test_a_client_that_goes_away_while_it_waits(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        running = Call(rig, "/v1/completions")
        await until(lambda: rig.engine.running == 1)
        call = Call(rig, "/v1/completions", {"model": "v1"})
        await until(lambda: rig.waiting == 1)
        call.gone.set()
        await call.task
        assert (call.sent, rig.waiting, rig.server.places.taken) == ([], 0, 0)
        rig.engine.go.set()
        assert await running.answer() == (200, rig.expected["base"])

    run_rig(test)


@pytest.mark.parametrize("path", ["/v1/completions", "/stream"])
def test_a_request_that_a_swap_ends(run_rig: RunRig, path: str) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        call = Call(rig, path, x_request_id="mine")
        await until(lambda: rig.engine.running == 1)
        swapping = Call(rig, "/v1/completions", {"model": "v1"})
        await call.task
        if path == "/stream":
            assert [message["more_body"] for message in call.sent[1:]] == [True, False]
            error = json.loads(call.sent[-1]["body"].removeprefix(b"data: "))["error"]
            assert (error["type"], error["code"], "(mine)" in error["message"]) == ("EngineDownError", 503, True)
        else:
            assert await call.refusal() == (503, "EngineDownError", "1")
        rig.engine.go.set()
        assert await swapping.answer() == (200, rig.expected["v1"])

    run_rig(test, drain="abort")


def test_a_request_that_is_ended_before_it_runs(run_rig: RunRig) -> None:
    """A swap may begin between a request's admission and its first step."""

    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        call = Call(rig, "/v1/completions")
        while not rig.server.gate.running:
            await asyncio.sleep(0)
        assert call.admitted == []
        for ticket in rig.server.gate.running:
            ticket.abort()
        await until(lambda: call.task.done() or rig.engine.running > 0)
        assert rig.engine.running == 0
        assert await call.refusal() == (503, "EngineDownError", "1")
        assert not rig.server.gate.running

    run_rig(test)
