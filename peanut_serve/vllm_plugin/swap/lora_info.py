"""What gateways read for affinity, `vllm:lora_requests_info`, from what the server knows, in place of vLLM's metric.

vLLM 0.32's own (`vllm/v1/metrics/loggers.py`) keeps a series for every combination of names that ever ran together,
tells every name as running and waiting alike, knows no swapped weights, and does not exist without LoRA.
"""

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import PrometheusStatLogger

from peanut_serve.swapping import metrics


def tell_residency(client: AsyncLLM) -> None:
    """Serve the metrics of `metrics.STATE`, the one of vLLM's name in place of vLLM's."""
    found = client.logger_manager.stat_loggers if client.logger_manager is not None else []
    loggers = [one for one in found if isinstance(one, PrometheusStatLogger)]
    for one in loggers:
        if one.gauge_lora_info is not None:
            metrics.unregister(one.gauge_lora_info)
            one.gauge_lora_info = None  # or it would go on to collect series

    def waiting() -> float:
        """What vLLM's `vllm:num_requests_waiting` says."""
        gauges = [gauge for one in loggers for gauge in one.gauge_scheduler_waiting.values()]
        return sum(sample.value for gauge in gauges for family in gauge.collect() for sample in family.samples)

    metrics.STATE.register(waiting)
