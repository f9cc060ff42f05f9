"""The format `lora`: adapters as one LoRA adapter, exact, or of a given rank with a stated error."""

from converters.outputs.lora.options import LoraOptions
from converters.outputs.lora.plan import LoraAdapterPlan, as_lora, plan_lora_adapter
from converters.outputs.lora.vllm_limits import VLLM_RANKS
from converters.outputs.lora.write import LoraCheck, write_lora_adapter

__all__ = [
    "VLLM_RANKS",
    "LoraAdapterPlan",
    "LoraCheck",
    "LoraOptions",
    "as_lora",
    "plan_lora_adapter",
    "write_lora_adapter",
]
