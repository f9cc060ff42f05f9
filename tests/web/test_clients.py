"""What one client cannot do: stop a swap, read past the key, take a route that is not known, outlive its request."""

import asyncio
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.server.call import Call
from support.server.rig import Rig, RunRig, make_weights, rig_runner, until
from support.server.weights import Weights

from peanut_serve.swapping import gate
from peanut_serve.web import exchange
from peanut_serve.web.request_body import ClientLimits
from peanut_serve.web.routes import _ACCESS, _REASONS, Access, access_to

STREAM = "/v1/chat/completions"
HEADER = "x_amzn_sagemaker_adapter_identifier"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("clients"))


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    monkeypatch.setattr(exchange, "_FAREWELL_SECONDS", 0.05)
    monkeypatch.setattr(gate, "ABORT_SECONDS", 0.5)
    return rig_runner(weights, tmp_path, monkeypatch)


@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_does_not_read_its_response(run_rig: RunRig, begun: bool) -> None:
    """A swap goes on, whether the response has begun or not, and other clients are answered."""

    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        call = Call(rig, STREAM if begun else "/v1/completions")
        if not begun:
            call.reads.clear()
        await until(lambda: rig.engine.running == 1)
        call.reads.clear()
        other = Call(rig, "/v1/completions", {"model": "v1"})
        await until(lambda: rig.engine.running == 0)
        rig.engine.go.set()
        assert await other.answer() == (200, rig.expected["v1"])
        await asyncio.wait_for(call.task, 5)
        assert not rig.server.gate.running

    run_rig(test, drain_timeout=0.05)


def test_a_response_that_is_never_read_ends(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        call = Call(rig, STREAM, limits=ClientLimits(stall_seconds=0.1))
        call.reads.clear()
        await asyncio.wait_for(call.task, 5)
        assert (call.sent, rig.engine.running, len(rig.server.gate.running)) == ([], 0, 0)

    run_rig(test)


def test_a_request_that_does_not_end_when_it_is_aborted(run_rig: RunRig) -> None:
    """It no longer counts: the engine aborts its work, and nothing that it still does is let in."""

    async def test(rig: Rig) -> None:
        go_on, admissions = asyncio.Event(), []

        async def stubborn() -> None:
            async with rig.server.serving("base", lambda: None) as admitted:
                admissions.append(admitted)
                await go_on.wait()

        task = asyncio.create_task(stubborn())
        await until(lambda: bool(admissions))
        assert admissions[0].is_running()
        await asyncio.wait_for(rig.ask("v1"), 10)
        assert not admissions[0].is_running()
        go_on.set()
        await task

    run_rig(test, drain_timeout=0.05)


def test_a_body_that_does_not_arrive(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        call = Call(rig, STREAM, limits=ClientLimits(body_seconds=0.05))
        call.uploads.clear()
        assert await call.refusal() == (408, "RequestTimeoutError", None)
        assert call.header("connection") == "close"
        call = Call(rig, STREAM, b"x" * 5000, limits=ClientLimits(body_bytes=4096))
        assert await call.refusal() == (413, "RequestTooLargeError", None)
        assert rig.server.places.taken == 0

    run_rig(test)


def test_a_response_in_the_background_is_refused(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        for path in ("/v1/responses", STREAM):
            call = Call(rig, path, {"model": "v1", "background": True})
            assert await call.refusal() == (400, "RequestBodyError", None)
        assert rig.swaps == 0

    run_rig(test)


def test_the_name_on_invocations(run_rig: RunRig) -> None:
    """vLLM takes the name from a header there: it gets the one that the weights were admitted for."""

    async def test(rig: Rig) -> None:
        for body, headers, name in (
            ({"model": "v1"}, {}, "v1"),
            ({}, {HEADER: "v2"}, "v2"),
            ({"model": "v3"}, {HEADER: "v3"}, "v3"),
            ({}, {}, "base"),
        ):
            call = Call(rig, "/invocations", body, **headers)
            assert await call.answer() == (200, rig.expected[name])
            found = [value for key, value in call.scope["headers"] if b"sagemaker" in key]
            assert (call.admitted, found) == ([name], [name.encode()] if name != "base" else [])
        call = Call(rig, "/invocations", {"model": "v1"}, **{HEADER: "v2"})
        assert await call.refusal() == (400, "RequestBodyError", None)
        call = Call(rig, "/v1/completions", {"model": "v1"}, **{HEADER: "v2"})
        assert await call.answer() == (200, rig.expected["v1"])  # elsewhere it means nothing

    run_rig(test)


def test_every_route_is_keyed_or_open(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        keys = ("one", "schlüssel")
        for path in [*_ACCESS, *_REASONS, "/a/route/of/a/later/vllm", "/v1/completions/", "//v1/completions", ""]:
            access = access_to(path)
            for offered in (None, "Bearer two", "Basic one", "Bearer", "Bearer one ones"):
                headers = {"authorization": offered} if offered else {}
                status = (await Call(rig, path, {"model": "base"}, keys=keys, **headers).answer())[0]
                assert status == (200 if access is Access.OPEN else 401), (path, offered)
            for method in ("POST", "GET", "DELETE"):
                call = Call(rig, path, {"model": "base"}, method, keys=keys, authorization="bearer schlüssel")
                status, text = await call.answer()
                assert status == (404 if access is Access.REFUSED else 200), (path, method)
                if access is Access.REFUSED:
                    message = json.loads(text)["error"]["message"]
                    assert message.startswith(f"{method} {path or ''}"[:40])
                is_gated = access is Access.ANSWER and method == "POST"
                assert (call.header("x-peanut-variant") == "base") == is_gated, path

    run_rig(test)


def test_a_server_behind_a_prefix(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        call = Call(rig, "/llm/v1/completions", {"model": "v1"})
        call.scope["root_path"] = "/llm"
        assert await call.answer() == (200, rig.expected["v1"])

    run_rig(test)


def test_a_name_in_an_error_is_escaped_and_cut(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        for name in ("a\r\nX-Evil: 1", "\x1b[31m", "n" * 100_000):
            _, text = await Call(rig, STREAM, {"model": name}).answer()
            message = json.loads(text)["error"]["message"]
            assert message.isprintable()
            assert len(message) < 400

    run_rig(test)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["base", "v1", "v2", "v3", "broken", "../v1", "v1/", ""]) | st.text(max_size=12) | JSON
BODIES = (
    st.fixed_dictionaries({"model": NAMES}, optional={"stream": JSON, "background": JSON, "prompt": JSON})
    | JSON
    | st.binary(max_size=30)
)
PATHS = st.sampled_from([STREAM, "/v1/completions", "/invocations", "/v1/responses", "/tokenize"])


@pytest.mark.slow
@settings(max_examples=10)
@given(requests=st.lists(st.tuples(PATHS, BODIES, st.sampled_from(["v1", "nobody", ""]) | st.none()), min_size=40))
def test_whatever_a_client_sends(weights: Weights, requests: list[tuple[str, object, str | None]]) -> None:
    """It gets the weights that it names, or an error that says why; nothing is held afterwards."""

    async def test(rig: Rig) -> None:
        for path, body, header in requests:
            call = Call(rig, path, body, **({HEADER: header} if header is not None else {}))
            status, text = await call.answer()
            assert status in (200, 400, 404, 422), (path, body, text)
            if status != 200:
                assert json.loads(text)["error"]["message"].isprintable()
            elif access_to(path) is Access.ANSWER:
                named = call.header("x-peanut-variant")
                assert text.removeprefix("data: 1\n\n") == rig.expected[named]
                wanted = body.get("model") if isinstance(body, dict) else None
                wanted = wanted or (header if path == "/invocations" else None)
                assert named == (wanted or "base")
        assert (rig.server.places.taken, len(rig.server.gate.running), rig.waiting) == (0, 0, 0)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        rig_runner(weights, Path(folder), patch)(test)
