"""What a client receives: the variant of its response, or the reason of an error."""

import asyncio
import json
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from support.server.call import Call
from support.server.rig import Rig, RunRig, make_weights, rig_runner, until
from support.server.weights import Weights

from peanut_serve.web.middleware import VariantMiddleware


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("serving"))


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    return rig_runner(weights, tmp_path, monkeypatch)


def test_a_response_names_its_variant(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
            for name in ("v1", "base", "v2"):
                call = Call(rig, path, {"model": name, "n": 1}, x_request_id="mine")
                status, text = await call.answer()
                assert (status, text.removeprefix("data: 1\n\n")) == (200, rig.expected[name])
                digest = rig.server.catalogue.find(name).version.digest
                names = ("peanut-variant", "peanut-digest", "request-id", "peanut-path")
                found = [call.header(f"x-{header}") for header in names]
                computed = "base" if name == "base" else "merged"
                assert (found, call.admitted) == ([name, digest, "mine", computed], [name])
        for body in ({}, b"", {"model": None}, {"model": ""}, []):  # as in vLLM: the base
            call = Call(rig, "/v1/completions", body)
            assert await call.answer() == (200, rig.expected["base"])
            given = dict(call.scope["headers"])[b"x-request-id"].decode()
            assert call.header("x-request-id") == given != ""

    run_rig(test)


def test_routes_without_weights_do_not_wait(run_rig: RunRig) -> None:
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


def test_errors(run_rig: RunRig) -> None:
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
        assert after == before + 5  # no time series for an invented name
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


def test_a_client_that_disconnects_while_it_waits(run_rig: RunRig) -> None:
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


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_request_that_a_swap_aborts(run_rig: RunRig, path: str) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        call = Call(rig, path, x_request_id="mine")
        await until(lambda: rig.engine.running == 1)
        swapping = Call(rig, "/v1/completions", {"model": "v1"})
        await call.task
        if path == "/v1/chat/completions":
            assert [message["more_body"] for message in call.sent[1:]] == [True, False]
            error = json.loads(call.sent[-1]["body"].removeprefix(b"data: "))["error"]
            assert (error["type"], error["code"], "(mine)" in error["message"]) == ("EngineDownError", 503, True)
        else:
            assert await call.refusal() == (503, "EngineDownError", "1")
        rig.engine.go.set()
        assert await swapping.answer() == (200, rig.expected["v1"])

    run_rig(test, drain="abort")


def test_a_request_that_is_aborted_before_it_runs(run_rig: RunRig) -> None:
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
