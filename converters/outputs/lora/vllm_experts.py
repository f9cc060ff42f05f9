"""Experts as vLLM 0.32 loads them of a LoRA adapter: a module for each, or, for some models, as HF PEFT has them.

Sources: `pack_moe` in `vllm/lora/lora_weights.py`; `_stack_moe_lora_weights` in `vllm/lora/model_manager.py`, which
takes `experts.base_layer` for gate_up_proj and `experts` for down_proj; `is_3d_moe_weight` of the model classes.
"""

from collections.abc import Collection, Mapping, Sequence

from converters.models.architecture import Architecture
from converters.outputs.lora.experts import ExpertGroup

# the classes whose experts vLLM takes joined, and in no other form
_JOINED = ("GptOssForCausalLM", "Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")


def takes_joined(arch: Architecture) -> bool:
    """Whether vLLM loads one pair of factors for the experts of a parameter."""
    return arch.name in _JOINED


def expert_refusals(arch: Architecture, groups: Sequence[ExpertGroup], ranks: Mapping[str, int]) -> list[str]:
    """Why vLLM does not load these experts; empty if nothing speaks against it.

    Args:
        arch: the class of the model.
        groups: the experts, by their parameter.
        ranks: name of the matrix of an expert -> rank of its factors.
    """
    adapted = {group.parameter for group in groups}
    for group in groups:
        owner = group.parameter.rpartition(".")[0]
        if len(arch.shapes[group.parameter]) < 3:
            return [
                f"it adapts {group.parameter} as a parameter, and of parameters vLLM loads only the weights of "
                "experts; merge it"
            ]
        if group.stack is not None and not takes_joined(arch):
            return [
                f"{group.parameter} is stored as one tensor, and vLLM loads a module for each expert of "
                f"{arch.name}: save the base again with transformers, which stores experts one by one; or merge it"
            ]
        if len(group.places) < group.shape[0] * group.parts:
            return [f"it does not adapt every expert of {owner}, and vLLM loads all of them or none; merge it"]
        if beside := [name for name in _experts(arch, owner) if name not in adapted]:
            return [f"it adapts experts of {owner} but not {beside[0]}, and vLLM loads all or none; merge it"]
        if not takes_joined(arch) and (found := _rank_refusal(group, ranks)):
            return [found]
    return []


def _rank_refusal(group: ExpertGroup, ranks: Mapping[str, int]) -> str | None:
    """Why the ranks of the modules of experts are not what vLLM stacks."""
    most = [max(ranks[name] for name, (_, own) in group.places.items() if own == part) for part in range(group.parts)]
    for name, (_, part) in group.places.items():
        if ranks[name] != most[part]:
            return (
                f"{name} has rank {ranks[name]}, other experts have rank {most[part]}, and vLLM loads one rank for "
                "all; merge it"
            )
    return None


def _experts(arch: Architecture, owner: str) -> Collection[str]:
    """The parameters of one module that hold the weights of experts."""
    return [n for n, shape in arch.shapes.items() if n.rpartition(".")[0] == owner and len(shape) == 3]
