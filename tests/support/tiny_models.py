"""Tiny models with trained-looking adapters, and ways to damage them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeanutConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


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
