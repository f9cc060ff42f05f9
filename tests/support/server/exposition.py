"""Which metrics a server has in which mode, and why some are not in all."""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

EVERYWHERE = {
    "peanut_requests", "peanut_tokens", "peanut_queue_seconds", "peanut_evaluation_seconds", "peanut_rollbacks",
    "peanut_engine_restarts", "peanut_host_cache_bytes", "peanut_base_copy_bytes", "peanut_ready",
    "peanut_staged", "peanut_prepared_ahead",
    "peanut_waiting_requests", "peanut_queued_requests", "peanut_resident_variant", "vllm:lora_requests_info",
    "peanut_usage_requests", "peanut_usage_prompt_tokens", "peanut_usage_generated_tokens",
    "peanut_usage_engine_seconds", "peanut_refused_requests", "peanut_keys_current",
    "peanut_path_requests", "peanut_path_tokens",
}  # fmt: skip
# family -> the modes in which it has samples, and why it has none in the others
DIFFERENCES = {
    "peanut_swaps": ("merged auto", "in LoRA mode the engine keeps the weights of the base"),
    "peanut_swap_seconds": ("merged auto", "in LoRA mode the engine keeps the weights of the base"),
    "peanut_variant_host_bytes": ("merged auto", "in LoRA mode adapters are on disk and in the engine"),
    "peanut_loaded_adapter": ("lora auto", "in merged mode the engine has no adapters"),
}


def ours(text: str) -> Iterator[Metric]:
    """The families in the text of /metrics that this package defines."""
    for family in text_string_to_metric_families(text):
        is_own = family.name.startswith("peanut_") or family.name == "vllm:lora_requests_info"
        if is_own and not family.name.endswith("_created"):  # when a series began
            yield family


def check_families(text: str, mode: str, names: set[str]) -> None:
    """Whether a server that has answered and swapped has the metrics of its mode, with labels from its catalogue."""
    families = list(ours(text))
    assert {family.name for family in families} == {*EVERYWHERE, *DIFFERENCES}  # all are declared in every mode
    assert len(families) == len({family.name for family in families})
    expected = EVERYWHERE | {name for name, (modes, _) in DIFFERENCES.items() if mode in modes.split()}
    assert {family.name for family in families if family.samples} == expected
    labels = [sample.labels for family in families for sample in family.samples]
    by_variant = {one["variant"] for one in labels if "variant" in one}
    assert by_variant <= names | {"unknown", "other"}
