"""Prometheus metrics of hot-swapping, served with vLLM's own under /metrics.

The label `variant` is a name from the catalogue, never an arbitrary one from a client, and the series of a name end
with it, so their number is bounded.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

REQUESTS = Counter("peanut_requests", "Completed requests, by variant and outcome.", ["variant", "outcome"])
TOKENS = Counter("peanut_tokens", "Tokens of prompts and answers, by variant.", ["variant", "kind"])
PATH_REQUESTS = Counter("peanut_path_requests", "Admitted requests, by how the answer is computed.", ["path"])
PATH_TOKENS = Counter("peanut_path_tokens", "Tokens of answers, by how they were computed.", ["path"])
QUEUE_SECONDS = Histogram(
    "peanut_queue_seconds", "Time a request waited for its variant's weights.", ["variant"], buckets=_SECONDS
)
SWAPS = Counter(
    "peanut_swaps", "Swaps, by target variant and outcome: done, failed, cancelled.", ["variant", "outcome"]
)
SWAP_SECONDS = Histogram("peanut_swap_seconds", "Duration of a swap, by phase.", ["phase"], buckets=_SECONDS)
ROLLBACKS = Counter("peanut_rollbacks", "Swaps that failed after weights were loaded, and were rolled back.")
RESTARTS = Counter("peanut_engine_restarts", "Number of engine restarts.")
EVALUATIONS = Histogram("peanut_evaluation_seconds", "Time to evaluate a variant's weights.", buckets=_SECONDS)
STAGED = Counter(
    "peanut_staged", "Variants that were staged in the workers before a swap, by what came of it.", ["outcome"]
)
for _outcome in ("used", "unused"):
    STAGED.labels(_outcome)  # its series begin at 0
PREPARED_AHEAD = Counter("peanut_prepared_ahead", "Variants that were evaluated while the server was idle.")
HOST_CACHE = Gauge("peanut_host_cache_bytes", "Size of the evaluated weights in host memory.")
BASE_COPY = Gauge(
    "peanut_base_copy_bytes", "Size of the copies of the base's weights, in host memory or on the devices."
)
READY = Gauge("peanut_ready", "1 while requests can be answered.")
WAITING = Gauge("peanut_waiting_requests", "Requests waiting for a swap.")

_KV_CACHE = "vllm:kv_cache_usage_perc"

_BY_VARIANT = {
    REQUESTS: ("variant", "outcome"),
    TOKENS: ("variant", "kind"),
    QUEUE_SECONDS: ("variant",),
    SWAPS: ("variant", "outcome"),
}


def kv_cache_usage() -> float | None:
    """The part of vLLM's KV cache that is in use, by vLLM's own gauge; None if there is none."""
    families = REGISTRY.restricted_registry([_KV_CACHE]).collect()
    return max((sample.value for family in families for sample in family.samples), default=None)


def tokens() -> dict[str, dict[str, int]]:
    """Tokens so far: variant -> kind, `prompt` or `generated` -> number. In one pass: there may be many variants."""
    found: dict[str, dict[str, int]] = {}
    samples = (sample for family in TOKENS.collect() for sample in family.samples if sample.name.endswith("_total"))
    for sample in samples:
        found.setdefault(sample.labels["variant"], {})[sample.labels["kind"]] = int(sample.value)
    return found


def forget(variant: str) -> None:
    """Remove the series of a variant that is no longer served."""
    for metric, names in _BY_VARIANT.items():
        samples = [sample for family in metric.collect() for sample in family.samples]
        for labels in {tuple(sample.labels[name] for name in names) for sample in samples}:
            if labels[0] == variant:
                metric.remove(*labels)


@dataclass(frozen=True)
class Residency:
    """What the engine has at one moment, and what requests wait for. All names are from the catalogue.

    Attributes:
        resident: names of the weights that it has.
        loaded: names of the LoRA adapters in its slots; none while it has other weights than the base's.
        running: names that can be answered without a swap, and without loading an adapter, as gateways are told it.
        waiting: other names that requests wait for.
        limit: how many of them it can have at once; 0 while there is no engine.
        host_bytes: name -> size of its weights in host memory.
        queued: requests that wait until they may enter the engine.
    """

    resident: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()
    running: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    limit: int = 0
    host_bytes: Mapping[str, int] = field(default_factory=dict)
    queued: int = 0


class StateCollector(Collector):
    """Metrics whose labels say what there is now: no series outlives what it names, unlike those of a gauge.

    Attributes:
        residency: what is told; replaced as a whole, as the registry is read in other threads.
    """

    def __init__(self) -> None:
        self.residency = Residency()
        self._waiting_in_engine: Callable[[], float] = lambda: 0.0

    def register(self, waiting_in_engine: Callable[[], float]) -> None:
        """Serve these metrics with all others.

        Args:
            waiting_in_engine: number of requests that wait within the engine.
        """
        self._waiting_in_engine = waiting_in_engine
        REGISTRY.register(self)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """The families, for the registry."""
        return self.collect()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The current samples."""
        now = self.residency
        # what gateways read: the names are in labels, the value is a time, and the sample with the latest one counts
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "What the engine has, for gateways: the value is the time of this answer.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        info.add_metric([str(now.limit), _joined(now.waiting), _joined(now.running)], time.time())
        yield info
        by_variant = {
            ("peanut_resident_variant", "1 for every name of the weights that the engine has."): now.resident,
            ("peanut_loaded_adapter", "1 for every name of a LoRA adapter in the engine's slots."): now.loaded,
        }
        for (name, help_text), variants in by_variant.items():
            family = GaugeMetricFamily(name, help_text, labels=["variant"])
            for variant in variants:
                family.add_metric([variant], 1)
            yield family
        sizes = GaugeMetricFamily(
            "peanut_variant_host_bytes", "Size of a variant's evaluated weights in host memory.", labels=["variant"]
        )
        for variant, size in now.host_bytes.items():
            sizes.add_metric([variant], size)
        yield sizes
        queued = now.queued + self._waiting_in_engine()
        yield GaugeMetricFamily("peanut_queued_requests", "Requests that wait, before the engine or in it.", queued)


STATE = StateCollector()


def _joined(names: tuple[str, ...]) -> str:
    # gateways split at commas: a name of the base with one cannot be told
    return ",".join(name for name in names if "," not in name)


def unregister(metric: Collector) -> None:
    """Serve a metric no longer."""
    REGISTRY.unregister(metric)
