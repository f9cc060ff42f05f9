"""Prometheus metrics of a `TaskServer`.

The label `variant` is a name that the server knows, never an arbitrary one from a client: the number of series is
bounded.
"""

from collections import Counter as Counted
from collections import deque
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from peanut_serve.tenants.usage import REFUSED, USAGE
from peanut_serve.tenants.watched import KEYS_CURRENT

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64)
_OTHERS = "unknown"
_MOST_DURATIONS = 512  # of a task, the latest ones


@dataclass
class Traffic:
    """What was asked of a task since the start of the server, for people; Prometheus has the same for itself.

    Attributes:
        outcomes: requests by HTTP status.
        seconds: of the latest requests that were answered.
        runs: of the graph.
        rows: inputs in these runs.
        run_seconds: of all runs.
    """

    outcomes: Counted[str] = field(default_factory=Counted)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST_DURATIONS))
    runs: int = 0
    rows: int = 0
    run_seconds: float = 0.0

    @property
    def answered(self) -> int:
        """Requests that ended with a success."""
        return sum(count for outcome, count in self.outcomes.items() if outcome.startswith("2"))

    @property
    def failed(self) -> int:
        """All other requests."""
        return self.outcomes.total() - self.answered

    def quantile(self, part: float) -> float | None:
        """Seconds that this part of the latest answers did not exceed; None before the first."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else None


class Metrics:
    """The metrics of one server, in a registry of their own.

    Attributes:
        traffic: by task.
    """

    def __init__(self) -> None:
        self.traffic: dict[str, Traffic] = {}
        self.registry = CollectorRegistry()
        for metric in (USAGE, REFUSED, KEYS_CURRENT):  # those of the process
            self.registry.register(metric)
        own, each = self.registry, ["variant"]
        self.requests = Counter(
            "peanut_requests", "Completed requests, by task and HTTP status.", ["variant", "outcome"], registry=own
        )
        self.seconds = Histogram(
            "peanut_request_seconds",
            "Time from a request to its answer.",
            ["variant"],
            buckets=_SECONDS,
            registry=own,
        )
        self.batches = Counter("peanut_batches", "Runs of a graph.", each, registry=own)
        self.rows = Histogram("peanut_batch_rows", "Inputs that shared a run.", each, buckets=_ROWS, registry=own)
        self.run_seconds = Histogram("peanut_run_seconds", "Time of a run.", each, buckets=_SECONDS, registry=own)
        self.evicted = Gauge("peanut_evicted_tasks", "Tasks that were closed to make room.", registry=own)
        self.waiting = Gauge("peanut_waiting_inputs", "Inputs that are being prepared, wait, or run.", registry=own)
        self.open_bytes = Gauge("peanut_open_bytes", "Size of the graphs and adapters that are open.", registry=own)
        self.open_graphs = Gauge("peanut_open_graphs", "Sessions of ONNX Runtime.", registry=own)
        self.ready = Gauge("peanut_ready", "1 while requests are answered.", registry=own)

    def observe_run(self, name: str, rows: int, seconds: float) -> None:
        """Count a run."""
        self.batches.labels(name).inc()
        self.rows.labels(name).observe(rows)
        self.run_seconds.labels(name).observe(seconds)
        traffic = self.traffic.setdefault(name, Traffic())  # of the only thread that runs graphs
        traffic.runs += 1
        traffic.rows += rows
        traffic.run_seconds += seconds

    def observe_request(self, name: str | None, outcome: str, seconds: float) -> None:
        """Count a request; `name` is None if it named no task of this server."""
        self.requests.labels(name or _OTHERS, outcome).inc()
        self.seconds.labels(name or _OTHERS).observe(seconds)
        if name is not None:
            traffic = self.traffic.setdefault(name, Traffic())
            traffic.outcomes[outcome] += 1
            if outcome.startswith("2"):
                traffic.seconds.append(seconds)

    def exposition(self) -> bytes:
        """In the format that Prometheus reads."""
        return generate_latest(self.registry)
