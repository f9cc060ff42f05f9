"""What other libraries write in PEFT's form, or nearly so.

None of them runs here. The keys and configs are emulated, from the libraries' own source: an adapter that PEFT trains
is saved with the settings that they use, and renamed and stripped as they do it. The oracle is PEFT's unmerged model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.peft_methods import close, logits, reloaded, train
from support.tiny_models import edit_weights, tiny_llama
from transformers import LlamaForCausalLM

from converters import load_adapter, merge
from converters.errors import AdapterConfigError, LayoutError, PeanutError

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEAD = "base_model.model.lm_head"


def trained(folder: Path, model: LlamaForCausalLM | None = None, **settings: Any) -> torch.Tensor:
    """Train and save a LoRA with PEFT; the logits of PEFT's unmerged model."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings})
    model = model or tiny_llama()
    train(model, config, folder / "base", folder / "adapter")
    return logits(reloaded(model, folder / "base", folder / "adapter"))


def merged_logits(folder: Path) -> torch.Tensor:
    merge(folder / "base", folder / "adapter", folder / "merged")
    return logits(LlamaForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval())


def with_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


# fields of PEFT 0.8, which older adapters of LLaMA-Factory and axolotl have
PEFT_0_8 = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "base", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_dropout": 0.05, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "r": 4, "rank_pattern": {},
    "revision": None, "target_modules": LINEAR, "task_type": "CAUSAL_LM", "use_rslora": False,
}  # fmt: skip
# those of PEFT 0.15, with what unsloth adds (`unsloth/models/_utils.py`, `unsloth_zoo/peft_utils.py`)
UNSLOTH = {
    **PEFT_0_8, "corda_config": None, "eva_config": None, "exclude_modules": None, "layer_replication": None,
    "lora_bias": False, "trainable_token_indices": None, "use_dora": False, "target_modules":
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|"
    r"o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|"
    r"feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
    "auto_mapping": {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
        "unsloth_fixed": True,
    },
    "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit", "task_type": None,
}  # fmt: skip
CONFIGS = {"llama-factory": PEFT_0_8, "axolotl": {**PEFT_0_8, "peft_type": "LORA"}, "unsloth": UNSLOTH}


@pytest.mark.parametrize("library", ["unsloth", "llama-factory"])
def test_the_configs_of_older_pefts(tmp_path: Path, library: str) -> None:
    wanted = trained(tmp_path)
    with_config(tmp_path, CONFIGS[library])
    assert close(merged_logits(tmp_path), wanted)


def test_axolotl_trains_the_embeddings_along(tmp_path: Path) -> None:
    """`lora_modules_to_save: [embed_tokens, lm_head]` of axolotl; so does `additional_target` of LLaMA-Factory."""
    wanted = trained(tmp_path, modules_to_save=["embed_tokens", "lm_head"], use_rslora=True)
    with_config(tmp_path, {**CONFIGS["axolotl"], "modules_to_save": ["embed_tokens", "lm_head"], "use_rslora": True})
    assert close(merged_logits(tmp_path), wanted)


def to_tinker(folder: Path) -> None:
    """tinker-cookbook's `weights/_adapter.py` and `_merge.py` say how the service names modules."""
    edit_weights(
        folder / "adapter" / "adapter_model.safetensors",
        lambda w: {key.replace(HEAD, "base_model.model.model.unembed_tokens"): tensor for key, tensor in w.items()},
    )
    config = {"base_model_name_or_path": "base", "peft_type": "LORA", "r": 4, "lora_alpha": 8}
    with_config(folder, {**config, "target_modules": "all-linear"})


@pytest.mark.parametrize("tied", [False, True])
def test_tinker_calls_the_head_otherwise(tmp_path: Path, tied: bool) -> None:
    wanted = trained(tmp_path, tiny_llama(tie_word_embeddings=tied), target_modules=[*LINEAR, "lm_head"])
    to_tinker(tmp_path)
    assert "lm_head" in load_adapter(tmp_path / "adapter").modules
    assert close(merged_logits(tmp_path), wanted)


def test_experts_of_tinker_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, target_modules=["q_proj", "lm_head"])
    to_tinker(tmp_path)
    name = "base_model.model.model.layers.0.mlp.experts.w1"
    extra = {f"{name}.lora_A.weight": torch.ones(1, 4, 32), f"{name}.lora_B.weight": torch.ones(2, 72, 4)}
    edit_weights(tmp_path / "adapter" / "adapter_model.safetensors", lambda w: {**w, **extra})
    with pytest.raises(PeanutError, match=r"experts\.w1"):
        load_adapter(tmp_path / "adapter")


def to_torchtune(folder: Path, **changes: Any) -> None:
    """torchtune's `tune_to_peft_adapter_config`; the keys are PEFT's, and so is the order of their rows."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "peft_type": "LORA"}
    with_config(folder, {**config, "base_model_name_or_path": "meta-llama/Llama-3.2-1B", **changes})
    torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(4, 32)}, folder / "adapter" / "adapter_model.pt")


def test_torchtune_with_the_checkpointer_of_hugging_face(tmp_path: Path) -> None:
    wanted = trained(tmp_path)
    to_torchtune(tmp_path)
    assert close(merged_logits(tmp_path), wanted)


@pytest.mark.parametrize(("change", "refused"), [({}, True), ({"bias": "none"}, False)])
def test_torchtune_reorders_rows_of_qwen_wrongly(tmp_path: Path, change: dict[str, Any], refused: bool) -> None:
    trained(tmp_path)
    to_torchtune(tmp_path, base_model_name_or_path="Qwen/Qwen2.5-1.5B-Instruct", **change)
    if refused:
        with pytest.raises(LayoutError, match=r"was written by torchtune.*which is wrong for Qwen"):
            load_adapter(tmp_path / "adapter")
    else:
        assert load_adapter(tmp_path / "adapter").layout == "lora"
    values = {"target_modules": ["v_proj", "down_proj"]}
    to_torchtune(tmp_path, base_model_name_or_path="Qwen/Qwen2.5-1.5B-Instruct", **values)
    with pytest.raises(AdapterConfigError, match="the config's target_modules do not"):  # not about the order
        load_adapter(tmp_path / "adapter")
