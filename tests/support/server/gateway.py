"""How the endpoint picker of inference gateways reads a server and scores it, after its documented behaviour.

It is llm-d-router v0.10.0: `pkg/epp/framework/plugins/datalayer/extractor/metrics/{loraspec,extractor}.go` and
`pkg/epp/framework/plugins/scheduling/scorer/loraaffinity/lora_affinity.go`. The one of the Gateway API inference
extension v1.5.0, which moved there, has the same files and does the same.
"""

from dataclasses import dataclass
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.project.documents import GATEWAYS

MANIFESTS: dict[str, Any] = {one["kind"]: one for one in map(yaml.safe_load, GATEWAYS.blocks("yaml"))}


def metric_specs() -> dict[str, str]:
    """What the picker is told to read, from the page on gateways: `loraSpec` -> a metric, and so on."""
    plugins = MANIFESTS["EndpointPickerConfig"]["plugins"]
    extractor = next(one for one in plugins if one["type"] == "core-metrics-extractor")
    (engine,) = extractor["parameters"]["engineConfigs"]
    return {key: name for key, name in engine.items() if key.endswith("Spec")}


@dataclass(frozen=True)
class Endpoint:
    """One server as the picker sees it."""

    active: frozenset[str]
    waiting: frozenset[str]
    most: int

    def score(self, target: str) -> float:
        """How well a request for a model does there, for adapters: from 1, it is there, to 0, there is no room."""
        if target in self.active:
            return 1.0
        if len(self.active) + len(self.waiting) < self.most:
            return 0.8
        return 0.6 if target in self.waiting else 0.0


def samples_of(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Labels and value of each sample of a metric."""
    families = [family for family in text_string_to_metric_families(text) if family.name == name]
    assert len(families) <= 1, f"{name} is there more than once"
    return [(sample.labels, sample.value) for family in families for sample in family.samples]


def read_endpoint(text: str) -> Endpoint:
    """What the picker takes from the text of /metrics: of all samples, the one with the greatest value."""
    found = samples_of(text, "vllm:lora_requests_info")
    labels = max(found, key=lambda sample: sample[1])[0]
    names = {label: _split(labels[f"{label}_lora_adapters"]) for label in ("running", "waiting")}
    return Endpoint(names["running"], names["waiting"], int(labels["max_lora"]))


def read_queue(text: str, name: str = "vllm:num_requests_waiting") -> int:
    """The length of the queue, from the metric that the picker's `queuedRequestsSpec` names."""
    return int(samples_of(text, name)[0][1])


def _split(names: str) -> frozenset[str]:
    return frozenset(name.strip() for name in names.split(",") if name.strip())
