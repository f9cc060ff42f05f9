"""Spans for OpenTelemetry, beside vLLM's own: of a request, of its wait for the weights, and of each swap.

vLLM's `--otlp-traces-endpoint` turns them on, and decides where they go. The span of a request continues the trace
that its client has begun, and vLLM's span is made its child by the headers that vLLM reads.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from converters import __version__
from converters.errors import MissingDependencyError

try:
    from opentelemetry.context import Context
    from opentelemetry.trace import (
        SpanKind,
        Status,
        StatusCode,
        Tracer,
        get_current_span,
        get_tracer,
        set_span_in_context,
    )
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    _MISSING: ImportError | None = None
except ImportError as error:
    _MISSING = error

Attributes = Mapping[str, str | int | float | bool]

OPTION = "--otlp-traces-endpoint"  # of vLLM
_HEADERS = (b"traceparent", b"tracestate")
_tracer: "Tracer | None" = None


def check_tracing() -> None:
    """Raise `MissingDependencyError` if OpenTelemetry is not installed."""
    if _MISSING is not None:
        raise MissingDependencyError(
            f"{OPTION} needs OpenTelemetry ({_MISSING}): pip install opentelemetry-sdk opentelemetry-exporter-otlp"
        )


def start_tracing(tracer: "Tracer | None" = None) -> None:
    """Make spans in this process from now on; by default with the provider that vLLM has set up."""
    global _tracer
    _tracer = tracer if tracer is not None else get_tracer("peanut_serve", __version__)


def stop_tracing() -> None:
    """Make no spans any more."""
    global _tracer
    _tracer = None


@contextmanager
def request_span(scope: MutableMapping[str, Any]) -> Iterator[None]:
    """The span of a request, an ASGI scope, whose headers then name it as the parent."""
    if _tracer is None:
        yield
        return
    propagator = TraceContextTextMapPropagator()
    given = {key.decode(): value.decode("latin-1") for key, value in scope["headers"] if key in _HEADERS}
    facts = {"http.request.method": scope["method"], "url.path": scope["path"]}
    with _tracer.start_as_current_span(
        "peanut.request", propagator.extract(given, Context()), SpanKind.SERVER, facts
    ):
        own: dict[str, str] = {}
        propagator.inject(own)
        others = [(key, value) for key, value in scope["headers"] if key not in _HEADERS]
        scope["headers"] = [*others, *((key.encode(), value.encode("latin-1")) for key, value in own.items())]
        yield


def annotate(attributes: Attributes) -> None:
    """Say more of the request that is being handled."""
    if _tracer is not None:
        get_current_span().set_attributes(attributes)


@contextmanager
def span(name: str, attributes: Attributes) -> Iterator[Callable[[Attributes], None]]:
    """A part of what is done for a request, until the block ends; what is yielded adds attributes."""
    if _tracer is None:
        yield lambda more: None
        return
    made = _tracer.start_span(name, attributes=attributes)
    try:
        yield made.set_attributes
    except BaseException as error:
        made.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
        raise
    finally:
        made.end()


@dataclass(frozen=True)
class Past:
    """Something that has happened.

    Attributes:
        name: of its span.
        began, ended: in seconds since the epoch.
        attributes: what is known of it.
        error: why it failed.
        parts: what it consisted of.
    """

    name: str
    began: float
    ended: float
    attributes: Attributes = field(default_factory=dict)
    error: str | None = None
    parts: Iterable["Past"] = ()


def record(past: Past, parent: "Context | None" = None) -> None:
    """Make the span of something that has happened, and those of its parts; without a parent it is a trace."""
    if _tracer is None:
        return
    context = parent if parent is not None else Context()
    made = _tracer.start_span(past.name, context, attributes=past.attributes, start_time=_nanoseconds(past.began))
    if past.error is not None:
        made.set_status(Status(StatusCode.ERROR, past.error))
    for part in past.parts:
        record(part, set_span_in_context(made, Context()))
    made.end(_nanoseconds(past.ended))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
