"""Equality of LoRARequests. vLLM 0.32 compares only their names (`vllm/lora/request.py`).

A replaced adapter keeps its name while requests for its previous version are still in flight. A batch with both
versions then holds only one of them (`vllm/v1/worker/gpu_input_batch.py` makes a set of them), and the requests for
the other one crash the engine. vllm-project/vllm#30931 is about the same problem.
"""

from vllm.lora.request import LoRARequest


def distinguish_versions() -> None:
    """Make two LoRARequests equal only if their ids and paths are equal as well."""
    methods: dict[str, object] = {"__eq__": _is_same, "__hash__": _hash}
    for name, function in methods.items():
        setattr(LoRARequest, name, function)


def _is_same(one: LoRARequest, other: object) -> bool:
    return isinstance(other, LoRARequest) and _identity(one) == _identity(other)


def _hash(one: LoRARequest) -> int:
    return hash(_identity(one))


def _identity(request: LoRARequest) -> tuple[str, int, str]:
    return request.lora_name, request.lora_int_id, request.lora_path
