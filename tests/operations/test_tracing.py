"""Spans of requests, queue and swaps, that vLLM's span continues them, and that receivers of OTLP get them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import get_args

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from support.commands import Run
from support.server.call import Call
from support.server.otlp import Received, grpc_receiver, http_receiver
from support.server.rig import Rig, RunRig, make_weights, rig_runner
from support.server.weights import Weights
from support.tiny_models import Pair

from peanut_serve.signals import tracing
from peanut_serve.signals.tracing import start_tracing, stop_tracing
from peanut_serve.swapping.policy import Reason

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("traced"))


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    return rig_runner(weights, tmp_path, monkeypatch)


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """What gets the spans."""
    found, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(found))
    start_tracing(provider.get_tracer("test"))
    yield found
    stop_tracing()


def named(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    (found,) = [one for one in exporter.get_finished_spans() if one.name == name]
    return found


def identity(span: ReadableSpan) -> tuple[str, str]:
    """Of the trace and of the span, as in a traceparent."""
    context = span.get_span_context()
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def vllms_parent(call: Call) -> tuple[str, str]:
    """Trace and parent of the span that vLLM makes for a request: see `vllm.tracing.extract_trace_context`."""
    headers = {name: Headers(scope=call.scope)[name] for name in ("traceparent",)}
    context = get_current_span(TraceContextTextMapPropagator().extract(headers)).get_span_context()
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def test_a_request_and_its_swap(run_rig: RunRig, exporter: InMemorySpanExporter) -> None:
    async def test(rig: Rig) -> None:
        call = Call(rig, "/v1/completions", {"model": "v1"}, traceparent=TRACEPARENT, tracestate="a=b")
        assert (await call.answer())[0] == 200
        request, queue = named(exporter, "peanut.request"), named(exporter, "peanut.queue")
        assert identity(request)[0] == identity(queue)[0] == TRACE
        assert (parent_of(request), parent_of(queue)) == (PARENT, identity(request)[1])
        assert vllms_parent(call) == identity(request)
        assert Headers(scope=call.scope)["tracestate"] == "a=b"
        assert request.attributes["peanut.outcome"] == "200"
        digest = rig.server.swapper.active.version.digest
        facts = {"peanut.variant": "v1", "peanut.digest": digest, "peanut.kind": "adapter"}
        assert dict(queue.attributes) == facts
        swap = named(exporter, "peanut.swap")
        facts = {"outcome": "done", "from": "base", "to": "v1", "to_digest": digest, "waiting": 1}
        assert {name: swap.attributes[f"peanut.swap.{name}"] for name in facts} == facts
        assert swap.attributes["peanut.swap.from_digest"] == rig.server.catalogue.base.digest
        assert swap.attributes["peanut.swap.cause"] in get_args(Reason)
        assert swap.parent is None
        phases = ("quiesce", "apply", "invalidate", "check")
        parts = [named(exporter, f"peanut.swap.{phase}") for phase in phases]
        assert {parent_of(part) for part in parts} == {identity(swap)[1]}
        times = [time for part in parts for time in (part.start_time, part.end_time)]
        assert times == sorted(times)
        assert swap.start_time <= times[0] <= times[-1] <= swap.end_time
        assert queue.start_time <= swap.start_time <= queue.end_time

    run_rig(test)


def test_a_request_without_a_trace_begins_one(run_rig: RunRig, exporter: InMemorySpanExporter) -> None:
    async def test(rig: Rig) -> None:
        call = Call(rig, "/v1/completions", {"model": "base"})
        await call.answer()
        request = named(exporter, "peanut.request")
        assert request.parent is None
        assert vllms_parent(call) == identity(request)

    run_rig(test)


@pytest.mark.parametrize("given", ["", "00-0-0-01", "x" * 10_000, "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_traceparent_that_is_none(run_rig: RunRig, exporter: InMemorySpanExporter, given: str) -> None:
    async def test(rig: Rig) -> None:
        call = Call(rig, "/v1/completions", {"model": "base"}, traceparent=given)
        assert (await call.answer())[0] == 200
        assert named(exporter, "peanut.request").parent is None

    run_rig(test)


def test_a_client_that_does_not_sample_is_obeyed(run_rig: RunRig, exporter: InMemorySpanExporter) -> None:
    async def test(rig: Rig) -> None:
        call = Call(rig, "/v1/completions", {"model": "base"}, traceparent=TRACEPARENT[:-1] + "0")
        await call.answer()
        assert vllms_parent(call)[0] == TRACE
        assert exporter.get_finished_spans() == ()

    run_rig(test)


def test_refusals_and_failed_swaps(run_rig: RunRig, exporter: InMemorySpanExporter) -> None:
    async def test(rig: Rig) -> None:
        assert (await Call(rig, "/v1/completions", {"model": "broken"}).answer())[0] == 422
        queue = named(exporter, "peanut.queue")
        assert queue.status.status_code is StatusCode.ERROR
        assert "broken cannot be served" in str(queue.status.description)
        assert named(exporter, "peanut.request").attributes["peanut.outcome"] == "refused"
        rig.engine.fail("apply")
        assert (await Call(rig, "/v1/completions", {"model": "v2"}).answer())[0] == 500
        swap = named(exporter, "peanut.swap")
        assert swap.attributes["peanut.swap.outcome"] == "rolled_back"
        assert swap.status.status_code is StatusCode.ERROR
        assert named(exporter, "peanut.swap.roll_back").parent is not None

    run_rig(test)


def test_without_tracing_nothing_changes(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        call = Call(rig, "/v1/completions", {"model": "v1"}, traceparent=TRACEPARENT)
        assert (await call.answer())[0] == 200
        assert Headers(scope=call.scope)["traceparent"] == TRACEPARENT

    run_rig(test)


@pytest.mark.slow  # imports vLLM
@pytest.mark.parametrize(("protocol", "receiver"), [("grpc", grpc_receiver), ("http/protobuf", http_receiver)])
def test_spans_reach_a_receiver(
    run_rig: RunRig,
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    receiver: Callable[[], AbstractContextManager[Received]],
) -> None:
    """By the exporter that vLLM chooses; test_signals_of_vllm.py has an engine."""
    from vllm.tracing.otel import get_span_exporter

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    with receiver() as received:
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(get_span_exporter(received.endpoint)))
        start_tracing(provider.get_tracer("test"))
        try:

            async def test(rig: Rig) -> None:
                call = Call(rig, "/v1/completions", {"model": "v1"}, traceparent=TRACEPARENT)
                assert (await call.answer())[0] == 200

            run_rig(test)
            provider.shutdown()
        finally:
            stop_tracing()
    names = {span.name for span in received.spans}
    assert {"peanut.request", "peanut.queue", "peanut.swap", "peanut.swap.apply"} <= names
    (request,) = received.named("peanut.request")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)


def test_tracing_without_opentelemetry(
    pair: Pair, tmp_path: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    command = ("peanut-serve", "--base", pair.base, "--adapters", tmp_path / "tasks", "--dry-run")
    options = ("--otlp-traces-endpoint", "http://127.0.0.1:4318/v1/traces")
    assert run_here(*command, *options).returncode == 0
    monkeypatch.setattr(tracing, "_MISSING", ImportError("No module named 'opentelemetry'"))
    done = run_here(*command, *options)
    refusal = (
        "--otlp-traces-endpoint needs OpenTelemetry (No module named 'opentelemetry'): pip install opentelemetry-sdk"
    )
    assert (done.returncode, refusal in done.stderr) == (1, True)
    assert run_here(*command).returncode == 0
