"""What the benchmarks merge: a random Llama of 1.1B parameters, and random adapters of rank 32.

python benchmarks/make_inputs.py SMOLLM2 OUT
"""

import sys
from pathlib import Path

import torch
from peft import PeanutConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LLAMA_1B = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
)


def make_adapter(base: Path, adapter: Path) -> None:
    """An adapter as PEFT saves it, with random θ."""
    if not (adapter / "adapter_config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(base)
        settings = PeanutConfig(r=32, target_modules=TARGETS, init_weights=False, scaling=0.1)
        get_peft_model(model, settings).save_pretrained(adapter)


if __name__ == "__main__":
    smollm2, out = map(Path, sys.argv[1:])
    torch.manual_seed(0)
    if not (out / "llama-1.1b" / "config.json").exists():
        LlamaForCausalLM(LLAMA_1B).bfloat16().save_pretrained(out / "llama-1.1b")
    make_adapter(smollm2, out / "adapter-135m")
    make_adapter(out / "llama-1.1b", out / "adapter-1.1b")
