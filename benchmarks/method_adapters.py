"""An adapter of every method that a Llama can be adapted by, with settings that a user would choose.

python benchmarks/method_adapters.py METHOD BASE ADAPTER
"""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from make_inputs import TARGETS
from peft import PeftConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from transformers import AutoModelForCausalLM


def _on_llama(config: type[PeftConfig], **settings: Any) -> PeftConfig:
    return config(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings})


_BD_LORA = BdLoraConfig(target_modules_bd_a=["o_proj", "down_proj"], nblocks=4, match_strict=False)

# method, or what PEANuT has as a special case -> config
ROWS: dict[str, PeftConfig] = {
    "lora": _on_llama(peft.LoraConfig, r=16),
    "peanut": _on_llama(peft.PeanutConfig, r=32, depth=1, scaling=0.1),
    "dora": _on_llama(peft.LoraConfig, r=16, use_dora=True),
    "pissa": _on_llama(peft.LoraConfig, r=16, init_lora_weights="pissa"),
    "olora": _on_llama(peft.LoraConfig, r=16, init_lora_weights="olora"),
    "bd-lora": _on_llama(peft.LoraConfig, r=16, use_bdlora=_BD_LORA),
    "kasa": _on_llama(peft.LoraConfig, r=16, kasa_config=KasaConfig()),
    "lora-embedding": _on_llama(peft.LoraConfig, r=16, target_modules=["embed_tokens"]),
    "dora-embedding": _on_llama(peft.LoraConfig, r=16, use_dora=True, target_modules=["embed_tokens"]),
    "trainable-tokens": _on_llama(
        peft.TrainableTokensConfig, target_modules=["embed_tokens"], token_indices=list(range(8))
    ),
    "ia3": _on_llama(peft.IA3Config, feedforward_modules=["down_proj"]),
    "adalora": _on_llama(peft.AdaLoraConfig, init_r=16, total_step=9),
    "vera": _on_llama(peft.VeraConfig, r=256),
    "vera-seeded": _on_llama(peft.VeraConfig, r=256, save_projection=False),
    "pvera": _on_llama(peft.PveraConfig, r=256),
    "pvera-seeded": _on_llama(peft.PveraConfig, r=256, save_projection=False),
    "vblora": _on_llama(peft.VBLoRAConfig, r=4, num_vectors=90, vector_length=256),
    "unilora": _on_llama(peft.UniLoraConfig, r=4, theta_d_length=4096, save_indices=True),
    "tinylora": _on_llama(peft.TinyLoraConfig, r=2, u=8),
    "miss": _on_llama(peft.MissConfig, r=64),
    "miss-bat": _on_llama(peft.MissConfig, r=64, init_weights="bat"),
    "gralora": _on_llama(peft.GraloraConfig, r=32, gralora_k=2),
    "delora": _on_llama(peft.DeloraConfig, r=16),
    "hira": _on_llama(peft.HiraConfig, r=32),
    "glora": _on_llama(peft.GloraConfig, r=16),
    "hra": _on_llama(peft.HRAConfig, r=8),
    "deft": _on_llama(peft.DeftConfig, r=16),
    "oft": _on_llama(peft.OFTConfig, oft_block_size=32),
    "boft": _on_llama(peft.BOFTConfig, boft_block_size=4),
    "road": _on_llama(peft.RoadConfig, variant="road_1", group_size=64),
    "osf": _on_llama(peft.OSFConfig, effective_rank=0.9),
    "psoft": _on_llama(peft.PsoftConfig, r=32),
    "frod": _on_llama(peft.FrodConfig, progressbar=False),
    "adamss": _on_llama(peft.AdamssConfig, r=100, num_subspaces=5, subspace_rank=2),
    "loha": _on_llama(peft.LoHaConfig, r=16),
    "lokr": _on_llama(peft.LoKrConfig, r=16),
    "fourierft": _on_llama(peft.FourierFTConfig, n_frequency=1000),
    "waveft": _on_llama(peft.WaveFTConfig, n_frequency=2592),
    "c3a": _on_llama(peft.C3AConfig, block_size=256),
    "shira": _on_llama(peft.ShiraConfig, r=16, random_seed=1),
    "supertuning": _on_llama(peft.SupertuningConfig, sparsity=0.99),
    "randlora": _on_llama(peft.RandLoraConfig, r=32),
}
# the others, and why
WITHOUT_ROW = {
    "lora-bias": "a Llama has no biases",
    "beft": "a Llama has no biases",
    "lora-convolution": "a Llama has no convolutions",
    "dora-convolution": "a Llama has no convolutions",
    "red": "PEFT does not have it",
    "qalora": "PEFT trains it on quantized layers, and does not merge it",
}
# what users have to write into the config
_ADDED = {"psoft": {"svd_backend": "mkl"}}


def main() -> None:
    """Make one adapter with random θ, and save it as PEFT does."""
    name, base, adapter = sys.argv[1:]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    adapted = peft.get_peft_model(model, ROWS[name])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    adapted.save_pretrained(adapter)
    config = Path(adapter) / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **_ADDED.get(name, {})}))


if __name__ == "__main__":
    main()
