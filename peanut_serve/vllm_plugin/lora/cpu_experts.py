"""Mixtures of experts with LoRA on the CPU: what vLLM 0.32 has no kernel for.

With LoRA enabled, whichever modules it adapts, vLLM computes experts by Triton (`select_unquantized_moe_backend` in
`vllm/model_executor/layers/fused_moe/oracle/unquantized.py`). On a CPU without Triton its engine ends.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import OptionError
from converters.serving import read_json

# as `get_num_experts` in `vllm/transformers_utils/model_arch_config_convertor.py` finds them
_COUNTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")


def refuse_experts_on_cpu(base: str) -> None:
    """Raise `OptionError` if the base, as far as it is in a folder, is one that vLLM cannot serve here with LoRA."""
    file = Path(base).expanduser() / "config.json"
    count = _count(read_json(file, "config")) if file.is_file() else None
    if count is None:
        return
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if current_platform.is_cpu() and not HAS_TRITON:
        raise OptionError(
            f"{base} is a mixture of experts ({count}), which vLLM 0.32 does not serve with LoRA on the CPU, nor can "
            "its weights be swapped there: merge each adapter with peanut-merge, and serve the result with vllm "
            "serve; or use a GPU"
        )


def _count(config: Mapping[str, Any]) -> str | None:
    """The setting that says how many experts there are."""
    text = config.get("text_config")
    own = text if isinstance(text, dict) else config
    return next((f"{name} = {own[name]}" for name in _COUNTS if own.get(name)), None)
