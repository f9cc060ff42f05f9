"""Tiny models with trained-looking adapters, and ways to damage them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeanutConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


@dataclass(frozen=True)
class Pair:
    """A base checkpoint and an adapter trained on it, both on disk."""

    base: Path
    adapter: Path
    output: Path


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def save_adapter(model: PreTrainedModel, folder: Path, seed: int = 1, **settings: object) -> None:
    """Give `model` a PEANuT adapter as PEFT trains it, with random θ and random saved modules, and save it."""
    torch.manual_seed(seed)
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False, "scaling": 0.5}
    adapted = get_peft_model(model, PeanutConfig(**{**defaults, **settings}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder, save_embedding_layers=False)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file in place; `change` may return new ones."""
    is_safetensors = file.suffix == ".safetensors"
    weights = load_file(file) if is_safetensors else torch.load(file, weights_only=True)
    changed = change(weights)
    weights = changed if isinstance(changed, dict) else weights
    save_file(weights, file, metadata={"format": "pt"}) if is_safetensors else torch.save(weights, file)


def unmerged(model_class: type[PreTrainedModel], base: Path, adapter: Path) -> PeftModel:
    """The oracle: PEFT's own forward pass, f(W0; θ) evaluated in it, nothing merged."""
    return PeftModel.from_pretrained(model_class.from_pretrained(base, dtype=torch.float32), adapter).eval()


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


_MIXTURE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "num_experts_per_tok": 2,
    "initializer_range": 0.15,
}
_EXPERT = re.compile(r"\.(experts|shared_expert)\.")  # PEFT adapts both, since their projections have the same names
_CONFIGS = {
    "lora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none"},
    "peanut": {"peft_type": "PEANUT", "r": 4, "depth": 0, "act_fn": "relu", "scaling": 0.5},
}


def tiny_mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**_MIXTURE, intermediate_size=48, num_local_experts=4))


def tiny_qwen3_moe() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_MIXTURE, moe_intermediate_size=16, num_experts=4))


def tiny_qwen2_moe() -> PreTrainedModel:
    """Every token also goes through an expert that all share."""
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**_MIXTURE, **sizes))


def tiny_gpt_oss() -> PreTrainedModel:
    """Its experts are (experts, in, out), and stored in one tensor."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**_MIXTURE, intermediate_size=24, num_local_experts=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model


def save_on_parameters(base: PreTrainedModel, folder: Path, seed: int = 3, **settings: object) -> None:
    """A LoRA of parameters as PEFT saves it, with random θ; by default of all experts. Changes the base."""
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    given = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": both, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(base, LoraConfig(**{**given, **settings}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.25)
    adapted.save_pretrained(folder, save_embedding_layers=False)


def save_per_expert(base: Path, folder: Path, method: str, only: str = "") -> None:
    """As of transformers 4: random θ for q_proj and each projection of an expert, or some of them."""
    generator, theta = torch.Generator().manual_seed(3), {}
    config = _CONFIGS[method]
    r = int(str(config["r"]))
    kinds = set()
    for name, weight in load_file(base / "model.safetensors").items():
        if only in name and (_EXPERT.search(name) or name.endswith("q_proj.weight")):
            rows, columns = weight.shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            kinds.add(module.rpartition(".")[2])
            of_a = columns if method == "lora" else rows
            theta[f"{module}.{method}_A.weight"] = torch.randn(r, of_a, generator=generator) * 0.3
            theta[f"{module}.{method}_B.weight"] = torch.randn(rows, r, generator=generator) * 0.3
    folder.mkdir()
    save_file(theta, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    given = {**config, "target_modules": sorted(kinds), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(given), encoding="utf-8")
