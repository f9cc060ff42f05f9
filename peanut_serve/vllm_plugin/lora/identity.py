"""Which LoRARequests are one adapter. vLLM 0.32 goes by the name (`vllm/lora/request.py`).

A replaced adapter keeps its name while requests for its last version are still in flight. A batch with both then
holds one of the two, and the other's requests end the engine (`vllm/v1/worker/gpu_input_batch.py` makes a set of
them). vllm-project/vllm#30931 is about the same.
"""

from vllm.lora.request import LoRARequest


def tell_versions_apart() -> None:
    """Let two requests be equal only if id and path are, too."""
    mended: dict[str, object] = {"__eq__": _is_same, "__hash__": _hash}
    for name, function in mended.items():
        setattr(LoRARequest, name, function)


def _is_same(one: LoRARequest, other: object) -> bool:
    return isinstance(other, LoRARequest) and _identity(one) == _identity(other)


def _hash(one: LoRARequest) -> int:
    return hash(_identity(one))


def _identity(request: LoRARequest) -> tuple[str, int, str]:
    return request.lora_name, request.lora_int_id, request.lora_path
