"""What cannot be merged, and what is not read yet: why, and what to do with it."""

import re

from converters.adapters.source import AdapterSource
from converters.errors import LayoutError
from converters.methods.table import PEFT_METHODS

# types that are read by layouts of their own
_OWN = ("PEANUT", "LORA", "LN_TUNING")

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
    "arrow_config": "it is an Arrow mixture, which chooses among LoRA adapters for every token",
}

# all that torchtune writes into an adapter_config.json (its `recipes/lora_finetune_single_device.py`)
_TORCHTUNE_FIELDS = {"r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path"}

# keys of libraries that are not read -> what they are, and what to do
_FOREIGN_KEYS = {
    r"(layers\.\d+\.|output\.).*(lora_[ab]\.weight|magnitude)": (
        "is in torchtune's own names, with the rows of q_proj and k_proj in the order of Meta's rotary embedding, "
        "which the numbers of heads are needed to undo; torchtune's FullModelHFCheckpointer writes the same adapter "
        "as adapter_model.safetensors: give the folder of that"
    ),
    r"(lora_unet|lora_te\d*|lycoris)_[^.]+\..+": (
        "has keys of kohya's scripts or LyCORIS: they join the names of modules by underscores, so that the modules "
        "of a language model cannot be told from them; rename them to PEFT's form"
    ),
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
        _refuse_permuted(source)
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


def refuse_foreign_keys(source: AdapterSource) -> None:
    """Raise `LayoutError` for the keys of a library that is not read."""
    for key in source.keys:
        for pattern, reason in _FOREIGN_KEYS.items():
            if re.fullmatch(pattern, key):
                raise LayoutError(f"{source.path} {reason} (its keys: {key}, ...)")


def _refuse_permuted(source: AdapterSource) -> None:
    """Raise `LayoutError` for what torchtune writes of a Qwen model.

    `tune_to_peft_adapter_weights` reorders the rows of lora_B of q_proj and k_proj from Meta's order to that of
    transformers. Its Qwen models have the order of transformers already (`models/qwen2/_convert_weights.py`), so
    there the result is wrong, in PEFT as well.
    """
    config = source.config or {}
    base, targets = str(config.get("base_model_name_or_path")), config.get("target_modules")
    permuted = isinstance(targets, list) and {"q_proj", "k_proj"} & {str(name) for name in targets}
    if set(config) <= _TORCHTUNE_FIELDS and permuted and "qwen" in base.lower():
        raise LayoutError(
            f"{source.path} was written by torchtune for {base}, by the fields of its config: torchtune reorders "
            "the rows of lora_B of q_proj and k_proj, which is wrong for Qwen models; merge it with torchtune. If "
            'another program wrote it, add "bias": "none" to the config'
        )
