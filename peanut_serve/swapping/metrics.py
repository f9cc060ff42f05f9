"""Prometheus metrics of hot-swapping, served with vLLM's own under /metrics.

The label `variant` is a name from the catalogue, never an arbitrary one from a client, and the series of a name end
with it, so their number is bounded.
"""

from prometheus_client import REGISTRY, Counter, Gauge, Histogram

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

REQUESTS = Counter("peanut_requests", "Completed requests, by variant and outcome.", ["variant", "outcome"])
TOKENS = Counter("peanut_tokens", "Tokens of prompts and answers, by variant.", ["variant", "kind"])
QUEUE_SECONDS = Histogram(
    "peanut_queue_seconds", "Time a request waited for its variant's weights.", ["variant"], buckets=_SECONDS
)
SWAPS = Counter("peanut_swaps", "Swaps, by target variant and outcome.", ["variant", "outcome"])
SWAP_SECONDS = Histogram("peanut_swap_seconds", "Duration of a swap, by phase.", ["phase"], buckets=_SECONDS)
ROLLBACKS = Counter("peanut_rollbacks", "Swaps that failed and were rolled back.")
RESTARTS = Counter("peanut_engine_restarts", "Number of engine restarts.")
EVALUATIONS = Histogram("peanut_evaluation_seconds", "Time to evaluate a variant's weights.", buckets=_SECONDS)
HOST_CACHE = Gauge("peanut_host_cache_bytes", "Size of the evaluated weights in host memory.")
BASE_COPY = Gauge("peanut_base_copy_bytes", "Size of the base's weights in host memory.")
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


def tokens(variant: str) -> dict[str, int]:
    """Tokens of a variant so far, by kind: `prompt` and `generated`."""
    samples = [sample for family in TOKENS.collect() for sample in family.samples if sample.name.endswith("_total")]
    own = [sample for sample in samples if sample.labels["variant"] == variant]
    return {sample.labels["kind"]: int(sample.value) for sample in own}


def forget(variant: str) -> None:
    """Remove the series of a variant that is no longer served."""
    for metric, names in _BY_VARIANT.items():
        samples = [sample for family in metric.collect() for sample in family.samples]
        for labels in {tuple(sample.labels[name] for name in names) for sample in samples}:
            if labels[0] == variant:
                metric.remove(*labels)
