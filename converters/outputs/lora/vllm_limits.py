"""What vLLM 0.32 does not load of a LoRA adapter that HF PEFT loads, as far as the adapter tells.

Sources: `vllm/config/lora.py` (ranks), `PEFTHelper` in `vllm/lora/peft_helper.py` (heads, biases),
`parse_fine_tuned_lora_name` in `vllm/lora/utils.py` and `LoRAModel` in `vllm/lora/lora_model.py` (heads of one linear
layer), `_validate_token_classification_lora` in `vllm/lora/model_manager.py`. Ranks and alphas by module are loaded.
"""

from collections.abc import Collection, Sequence

# `vllm/config/lora.py`: what --max-lora-rank takes
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# `vllm/lora/peft_helper.py`: the modules_to_save that vLLM loads
_HEADS = ("classifier", "score")


def vllm_refusals(
    r: int, whole: Sequence[str], saved: Collection[str], changes_biases: bool, architecture: str
) -> tuple[str, ...]:
    """Why vLLM would not load a LoRA adapter; empty if nothing speaks against it.

    Args:
        r: its largest rank.
        whole: its modules_to_save.
        saved: the names of their tensors.
        changes_biases: it has lora_bias.
        architecture: class of the model.
    """
    found = []
    if r > VLLM_RANKS[-1]:
        found.append(f"its rank is {r}, vLLM serves up to {VLLM_RANKS[-1]}")
    if others := [module for module in whole if module not in _HEADS]:
        found.append(
            f"the adapter replaces the module {others[0]}; in a LoRA adapter, vLLM serves only replaced modules "
            f"called {' or '.join(_HEADS)}; merge it: a merged checkpoint can be served"
        )
    heads = [module for module in whole if module in _HEADS]
    if deep := sorted(name for name in saved if name.split(".")[0] in heads and name.count(".") > 1):
        found.append(
            f"the adapter replaces {deep[0]}; in a LoRA adapter, vLLM serves only heads that are one linear layer; "
            "merge it: a merged checkpoint can be served"
        )
    if heads and architecture.endswith("ForTokenClassification"):
        found.append(
            f"the adapter replaces the head {heads[0]} of a token classifier, which vLLM does not serve in a LoRA "
            "adapter; merge it: a merged checkpoint can be served"
        )
    if changes_biases:
        found.append(
            "the adapter changes biases (lora_bias), which vLLM does not load; merge it: a merged checkpoint can be "
            "served"
        )
    return tuple(found)
