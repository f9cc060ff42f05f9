"""What cannot be merged, and what is not read yet: why, and what to do with it."""

from converters.adapters.source import AdapterSource
from converters.errors import LayoutError
from converters.methods.table import PEFT_METHODS

# types that are read by layouts of their own
_OWN = ("PEANUT", "LORA")

_PROMPTS = "it learns prompts, which are not part of any weight"
_IN_PEFT = "so it cannot be merged; serve it with PEFT's PeftModel"

# peft_type -> why no weight does what it does (peft/utils/peft_types.py)
NOT_MERGEABLE = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"), _PROMPTS
    ),
    "ADAPTION_PROMPT": "it adds prompts with a gate of their own to the attention",
    "XLORA": "it weighs several LoRA adapters anew for every token",
    "POLY": "it mixes its LoRA adapters by the task of a request",
    "LILY": "it has a router that mixes its adapters anew for every token",
    "SHADOW": "it runs a second network beside the base",
}

# field of a LoraConfig that is in use -> the same
NOT_MERGEABLE_LORA = {
    "alora_invocation_tokens": "it is an aLoRA, which tokens of the prompt switch on",
    "layer_replication": "it stacks copies of the base's layers, which makes another model",
    "arrow_config": "it is an Arrow mixture, which chooses among LoRA adapters for every token",
}


def refuse_others(source: AdapterSource) -> None:
    """Raise `LayoutError` for what is an adapter of another kind."""
    found = source.peft_type
    if found in NOT_MERGEABLE:
        raise LayoutError(f"{source.path} says peft_type {found}: {NOT_MERGEABLE[found]}, {_IN_PEFT}")
    if found == "LORA" and source.config is not None:
        field = next((name for name in NOT_MERGEABLE_LORA if source.config.get(name)), None)
        if field is not None:
            raise LayoutError(f"{source.path} has {field}: {NOT_MERGEABLE_LORA[field]}, {_IN_PEFT}")
    if found == "None":
        _refuse_other_libraries(source)
    elif found is not None and found not in (*_OWN, *PEFT_METHODS):
        raise LayoutError(
            f"{source.path} says peft_type {found}; supported are {', '.join((*_OWN, *sorted(PEFT_METHODS)))}; merge "
            "it with PEFT's merge_and_unload"
        )


def _refuse_other_libraries(source: AdapterSource) -> None:
    """Raise `LayoutError` for an adapter_config.json without a peft_type that belongs to another library."""
    config = source.config or {}
    if "model_class" in config and isinstance(config.get("config"), dict):
        raise LayoutError(
            f"{source.path} is an adapter of AdapterHub's `adapters`: bottleneck layers compute between those of the "
            "base, so they cannot be merged; serve it with that library, whose merge_adapter merges what is LoRA"
        )
