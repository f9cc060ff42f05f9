"""One adapter or more of every method of HF PEFT that is read: what it is trained on, and with which settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peft
import torch
from peft import PeftConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "intermediate.dense"],
}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}


@dataclass(frozen=True)
class Case:
    """One adapter.

    Attributes:
        config: class of its config.
        settings: of the method.
        models: tiny models it is trained on, by name.
        rank: the largest of its exact LoRA form on these; None if it has none.
        float64: how far PEFT's own merge in float64 may be off: 1e-9, or more where PEFT rounds on its way.
        base: the dtype in which PEFT takes the base for that.
    """

    config: type[PeftConfig]
    settings: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ("llama", "bert")
    rank: int | None = None
    float64: float = 1e-9
    base: torch.dtype = torch.float64

    def on(self, model: str) -> PeftConfig:
        """The config for a tiny model."""
        common: dict[str, Any] = {"target_modules": TARGETS[model], "task_type": TASKS[model]}
        if model == "gpt2":
            common["fan_in_fan_out"] = True
        if model == "bert":
            common["modules_to_save"] = ["classifier"]
        return self.config(**common, **self.settings)


@dataclass
class PsoftConfig(peft.PsoftConfig):
    """Says what HF PEFT does not record: what decomposed W0."""

    svd_backend: str = "mkl"


ALL = ("llama", "gpt2", "bert")
# singular vectors in float32 are off by its precision over the distance of the singular values
_psoft: Callable[..., Case] = partial(Case, PsoftConfig, float64=1e-4, base=torch.float32)
_BD_LORA = BdLoraConfig(
    target_modules_bd_a=["down_proj", "query", "fc2"],
    target_modules_bd_b=["q_proj", "intermediate.dense"],
    nblocks=2,
    match_strict=False,
)
_randlora: Callable[..., Case] = partial(Case, peft.RandLoraConfig, models=ALL)

CASES = {
    "lora-bias": Case(peft.LoraConfig, {"r": 4, "lora_bias": True, "use_rslora": True}, ("bert", "gpt2"), rank=4),
    "kasa": Case(peft.LoraConfig, {"r": 4, "kasa_config": KasaConfig()}, rank=8, float64=1e-5),
    "bd-lora": Case(peft.LoraConfig, {"r": 4, "use_bdlora": _BD_LORA}, rank=4),
    "velora": Case(peft.LoraConfig, {"r": 4, "velora_config": VeloraConfig(num_groups=4)}, rank=4),
    "monteclora": Case(
        peft.LoraConfig, {"r": 4, "monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2)}, rank=4
    ),
    "adalora": Case(peft.AdaLoraConfig, {"init_r": 4, "lora_alpha": 6, "total_step": 9}, ALL, rank=4),
    "adalora ignores": Case(
        peft.AdaLoraConfig,
        {"init_r": 4, "total_step": 9, "alpha_pattern": {"v_proj": 7}, "lora_bias": True, "use_rslora": True},
        ("llama",),
        rank=4,
    ),
    "vera": Case(peft.VeraConfig, {"r": 4}, ALL, rank=4),
    "pvera": Case(peft.PveraConfig, {"r": 4}, ALL, rank=4),
    "vera from its seed": Case(peft.VeraConfig, {"r": 4, "save_projection": False, "projection_prng_key": 5}, ALL, 4),
    "pvera from its seed": Case(peft.PveraConfig, {"r": 4, "save_projection": False}, ALL, 4),
    "vblora": Case(peft.VBLoRAConfig, {"r": 4, "num_vectors": 20, "vector_length": 8}, ALL, rank=4),
    "vblora topk": Case(
        peft.VBLoRAConfig,
        {"r": 4, "num_vectors": 20, "vector_length": 8, "topk": 3, "save_only_topk_weights": True},
        ALL,
        rank=4,
        float64=1e-6,
    ),
    "unilora": Case(peft.UniLoraConfig, {"r": 4, "theta_d_length": 40, "save_indices": True}, ALL, rank=4),
    "tinylora": Case(peft.TinyLoraConfig, {"r": 3, "u": 5}, ALL, rank=3),
    "tinylora tied": Case(peft.TinyLoraConfig, {"r": 3, "u": 5, "weight_tying": 0.5}, ALL, rank=3),
    "tinylora one": Case(peft.TinyLoraConfig, {"r": 40, "u": 5, "weight_tying": 1.0}, ("llama",), rank=32),
    "miss": Case(peft.MissConfig, {"r": 8}, rank=8),
    "miss with a rest": Case(peft.MissConfig, {"r": 5}, rank=5),
    "miss mini": Case(peft.MissConfig, {"r": 8, "mini_r": 8, "init_weights": "mini"}, rank=8),
    "miss bat": Case(peft.MissConfig, {"r": 8, "init_weights": "bat"}),
    "gralora": Case(peft.GraloraConfig, {"r": 4, "alpha": 6, "gralora_k": 2}, ALL, rank=8),
    "gralora hybrid": Case(peft.GraloraConfig, {"r": 4, "hybrid_r": 3, "gralora_k": 4}, ALL, rank=19),
    "delora": Case(peft.DeloraConfig, {"r": 4, "delora_lambda": 3}, rank=4),
    "loha": Case(peft.LoHaConfig, {"r": 3, "alpha": 6}, rank=9),
    "loha full": Case(peft.LoHaConfig, {"r": 6, "alpha_pattern": {"q_proj": 3, "query": 3}}, float64=1e-6),
    "lokr": Case(peft.LoKrConfig, {"r": 2, "alpha": 6, "decompose_both": True, "decompose_factor": 8}, rank=8),
    "lokr full": Case(peft.LoKrConfig, {"r": 8}),
    "hra": Case(peft.HRAConfig, {"r": 4}, rank=4),
    "hra orthogonal": Case(peft.HRAConfig, {"r": 5, "apply_GS": True}, rank=5),
    # PEFT computes these in float32
    "deft": Case(peft.DeftConfig, {"r": 4, "alpha": 6}, ALL, rank=4, float64=1e-5),
    "deft qr": Case(peft.DeftConfig, {"r": 4, "decomposition_method": "qr"}, ALL, rank=4, float64=1e-5),
    "deft square": Case(peft.DeftConfig, {"r": 40, "decomposition_method": "qr"}, ("llama",), rank=32, float64=1e-5),
    "deft para": Case(
        peft.DeftConfig, {"r": 4, "decomposition_method": "qr", "para": True}, ALL, rank=4, float64=1e-5
    ),
    "osf": Case(peft.OSFConfig, {"rank_pattern": {"q_proj": 0.25, "query": 20}}, float64=1e-5),
    "osf low": Case(peft.OSFConfig, {"effective_rank": 0.8}, rank=14, float64=1e-5),
    "psoft": _psoft({"r": 4}, rank=4),
    "psoft series": _psoft({"r": 5, "use_cayley_neumann": True, "cayley_neumann_eps": 0.4}, ("llama",), rank=5),
    "psoft free": _psoft({"r": 4, "psoft_orth": False, "psoft_mag_a": False, "ab_svd_init": "pissa_init"}, rank=4),
    "frod": Case(peft.FrodConfig, {"progressbar": False}, ALL, float64=1e-5),
    "adamss": Case(
        peft.AdamssConfig, {"r": 8, "num_subspaces": 3, "subspace_rank": 2}, rank=6, float64=1e-6, base=torch.float32
    ),
    "adamss many": Case(
        peft.AdamssConfig,
        {"r": 12, "num_subspaces": 20, "subspace_rank": 3, "use_dynamic_rank": True},
        ("llama",),
        rank=12,
        float64=1e-6,
        base=torch.float32,
    ),
    "hira": Case(peft.HiraConfig, {"r": 4}, ALL),
    "hira pattern": Case(peft.HiraConfig, {"r": 4, "rank_pattern": {"v_proj": 2}}, ("llama",)),
    "glora": Case(peft.GloraConfig, {"r": 3}),
    "glora vectors": Case(peft.GloraConfig, {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    "glora constants": Case(peft.GloraConfig, {"config_A_B": "constant", "config_C": "none"}),
    "oft": Case(peft.OFTConfig, {"oft_block_size": 8}),
    "oft exact": Case(peft.OFTConfig, {"oft_block_size": 4, "use_cayley_neumann": False}, float64=1e-6),
    "oft coft": Case(peft.OFTConfig, {"oft_block_size": 8, "coft": True, "eps": 0.3}, float64=1e-6),
    "oft shared": Case(peft.OFTConfig, {"oft_block_size": 8, "block_share": True}),
    **{
        f"oft {terms} terms": Case(
            peft.OFTConfig, {"oft_block_size": 8, "num_cayley_neumann_terms": terms}, ("llama",)
        )
        for terms in (2, 3, 4, 7)
    },
    "boft": Case(peft.BOFTConfig, {"boft_block_size": 4}, float64=1e-6),
    **{
        f"road {variant}": Case(peft.RoadConfig, {"variant": f"road_{variant}", "group_size": 8})
        for variant in (1, 2, 4)
    },
    "fourierft": Case(peft.FourierFTConfig, {"n_frequency": 50}, ALL, float64=1e-5),
    "waveft": Case(peft.WaveFTConfig, {"n_frequency": 50}, ALL),
    "waveft sym4": Case(
        peft.WaveFTConfig,
        {"n_frequency": 50, "n_frequency_pattern": {"q_proj": 31, "query": 31}, "wavelet_family": "sym4"},
        ALL,
        float64=1e-6,
    ),
    "waveft without idwt": Case(peft.WaveFTConfig, {"n_frequency": 50, "use_idwt": False}, ALL),
    "c3a": Case(peft.C3AConfig, {"block_size": 8}, float64=1e-5),
    "shira": Case(peft.ShiraConfig, {"r": 2, "random_seed": 3}),
    "supertuning": Case(peft.SupertuningConfig, {"sparsity": 0.9}),
    "supertuning supra": Case(peft.SupertuningConfig, {"sparsity": 0.95, "r": 4, "select_top": False}),
    "randlora": _randlora({"r": 4}),
    "randlora sparse": _randlora({"r": 5, "sparse": True, "randlora_alpha": 20}),
}
