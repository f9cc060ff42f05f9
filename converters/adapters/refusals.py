"""What cannot be merged, and what is not read yet: why, and what to do with it."""

from converters.adapters.foreign.keys import explain_keys
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

_ALORA = "it is an aLoRA, which tokens of the prompt switch on"
# field of a config that is set -> the same
NOT_MERGEABLE_FIELDS = {
    "alora_invocation_tokens": _ALORA,
    "alora_invocation_string": _ALORA,
    "invocation_string": _ALORA,  # IBM's own package, before it was part of PEFT
    "arrow_config": "it is an Arrow mixture, which chooses among LoRA adapters for every token",
}

_IN_ADAPTERS = "so it cannot be merged; serve it with that library"
# architecture in a config of AdapterHub's `adapters` -> what it is, and what to do; without one it is a bottleneck
_ADAPTERHUB = {
    "lora": "LoRA or (IA)³ in that library's own form; merge it there (merge_adapter), and save the model",
    "prefix_tuning": f"{_PROMPTS}, {_IN_ADAPTERS}",
    "prompt_tuning": f"{_PROMPTS}, {_IN_ADAPTERS}",
    "reft": f"it edits hidden states (ReFT), {_IN_ADAPTERS}",
    "union": "several adapters at once, which are not read; serve them with that library",
}
_BOTTLENECK = f"bottleneck layers compute between those of the base, {_IN_ADAPTERS}"

# all that torchtune writes into an adapter_config.json (its `recipes/lora_finetune_single_device.py`)
_TORCHTUNE_FIELDS = {"r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path"}


def refuse_others(source: AdapterSource) -> None:
    """Raise `LayoutError` for what is an adapter of another kind."""
    found = source.peft_type
    if found in NOT_MERGEABLE:
        raise LayoutError(f"{source.path} says peft_type {found}: {NOT_MERGEABLE[found]}, {_IN_PEFT}")
    config = source.config or {}
    field = next((name for name in NOT_MERGEABLE_FIELDS if config.get(name) is not None), None)
    if field is not None:
        raise LayoutError(f"{source.path} has {field}: {NOT_MERGEABLE_FIELDS[field]}, {_IN_PEFT}")
    if found == "LORA":
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
    own = config.get("config")
    if "model_class" in config and isinstance(own, dict):
        what = _ADAPTERHUB.get(str(own.get("architecture")), _BOTTLENECK)
        raise LayoutError(f"{source.path} is an adapter of AdapterHub's `adapters`: {what}")


def refuse_foreign_keys(source: AdapterSource, unclaimed: bool = False) -> None:
    """Raise `LayoutError` for the keys of a library that is not read; see `explain_keys`."""
    if (reason := explain_keys(source.keys, unclaimed)) is not None:
        raise LayoutError(f"{source.path} {reason}")


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
