"""Which release of HF PEFT brought which field of its LoraConfig: fields tell which code wrote a config.

Collected from the releases themselves (`peft/tuners/lora.py`, later `peft/tuners/lora/config.py`, and
`peft/config.py`), 0.3.0 to 0.21.0. `save_pretrained` writes every field that its LoraConfig has and no other one. The
PEANuT authors' LLM code is a fork of PEFT from before 0.3.0, whose config has `merge_weights` and `enable_lora`
(`tests/data/golden/authors-llm`).
"""

from collections.abc import Mapping
from typing import Any

# field -> the first release that has it; the other fields of 0.3.0 are in the fork as well
SINCE: Mapping[str, str] = {
    "init_lora_weights": "0.3.0",
    **dict.fromkeys(("layers_to_transform", "layers_pattern", "auto_mapping", "revision"), "0.4.0"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), "0.6.0"),
    **dict.fromkeys(("megatron_config", "megatron_core", "loftq_config"), "0.7.0"),
    "use_rslora": "0.8.0",
    "use_dora": "0.9.0",
    "layer_replication": "0.10.0",
    "runtime_config": "0.12.0",
    **dict.fromkeys(("exclude_modules", "eva_config", "lora_bias"), "0.14.0"),
    **dict.fromkeys(("trainable_token_indices", "corda_config"), "0.15.0"),
    **dict.fromkeys(("use_qalora", "qalora_group_size"), "0.16.0"),
    "target_parameters": "0.17.0",
    **dict.fromkeys(("peft_version", "alora_invocation_tokens", "arrow_config", "ensure_weight_tying"), "0.18.0"),
    **dict.fromkeys(("lora_ga_config", "use_bdlora"), "0.19.0"),
    **dict.fromkeys(("velora_config", "monteclora_config"), "0.20.0"),
    "kasa_config": "0.21.0",
}

# fields of forks of old releases, which no release since 0.3.0 writes
_OF_FORKS = ("merge_weights", "enable_lora")


def proves_peft(config: Mapping[str, Any] | None) -> str | None:
    """The evidence that HF PEFT itself wrote a config with `peft_type: LORA`, and not a fork of 2023; None without.

    A config with fields of a fork proves nothing: such a file was put together from two programs.
    """
    if config is None or any(field in config for field in _OF_FORKS):
        return None
    if version := config.get("peft_version"):
        return f"peft_version is {version}"
    found = [field for field in SINCE if field in config]
    if not found:
        return None
    newest = found[-1]
    return f"'{newest}' is a field of HF PEFT since {SINCE[newest]}, which the authors' fork does not have"
