"""Random settings of every method of HF PEFT that is merged, by a seed."""

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

import peft
from peft import PeftConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

Settings = dict[str, Any]
_PATTERNS: Settings = {"rank_pattern": {}, "alpha_pattern": {}}  # `draw` fills them, for the modules of a model


@dataclasses.dataclass
class SaidPsoftConfig(peft.PsoftConfig):
    """Says what HF PEFT does not record: what decomposed W0."""

    svd_backend: str = "mkl"


def _lora(rng: Random) -> Settings:
    others = ["dora", "dora", "bias", "rslora", "kasa", "bd", "velora", "monte", "tokens"]
    kind = "plain" if rng.random() < 0.4 else rng.choice(others)
    own: Settings = {
        "dora": {"use_dora": True},
        "bias": {"lora_bias": True},
        "kasa": {"kasa_config": KasaConfig()},
        "bd": {
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["o_proj", "down_proj", "fc2"],
                target_modules_bd_b=["q_proj", "query", "up_proj", "fc1"],
                nblocks=2,
                match_strict=False,
            )
        },
        "velora": {"velora_config": VeloraConfig(num_groups=4)},
        "monte": {"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2)},
        "tokens": {"trainable_token_indices": rng.sample(range(90), 3)},
    }.get(kind, {})
    if kind in ("plain", "dora"):
        inits = [True, False, "gaussian", "orthogonal", "mica", *(["pissa", "olora"] if kind == "plain" else [])]
        own |= {"init_lora_weights": rng.choice(inits), "use_rslora": rng.random() < 0.3}
    patterns = _PATTERNS if kind in ("plain", "dora", "rslora", "bias") else {}
    if kind == "plain" and rng.random() < 0.1:
        own["layer_replication"] = [[0, 2], [1, 2]]  # of Llama only, see `draw`
    own["ensure_weight_tying"] = rng.random() < 0.2
    return {"r": 4, "lora_alpha": rng.choice([1, 6, 8]), "use_rslora": kind == "rslora", **own, **patterns}


def _adalora(rng: Random) -> Settings:
    return {"init_r": rng.choice([3, 4]), "target_r": 2, "lora_alpha": rng.choice([4, 6]), "total_step": 9}


def _deft(rng: Random) -> Settings:
    given = {
        "r": rng.choice([3, 4]),
        "alpha": rng.choice([None, 6]),
        "decomposition_method": rng.choice(["relu", "qr"]),
    }
    return {**given, "para": given["decomposition_method"] == "qr" and rng.random() < 0.4, "init_scale": 0.5}


def _oft(rng: Random) -> Settings:
    cayley: Settings = {"use_cayley_neumann": True, "num_cayley_neumann_terms": rng.choice([2, 5])}
    exact: Settings = {"use_cayley_neumann": False, "coft": rng.random() < 0.5, "eps": 0.3}
    size: Settings = rng.choice([{"oft_block_size": 8}, {"oft_block_size": 0, "r": 4}])
    return {**size, **rng.choice([cayley, exact]), "block_share": rng.random() < 0.3}


def _boft(rng: Random) -> Settings:
    factor = rng.choice([1, 1, 2])
    size: Settings = rng.choice([{"boft_block_size": 4}, {"boft_block_size": 0, "boft_block_num": 4}])
    return {**size, "boft_n_butterfly_factor": factor}


def _miss(rng: Random) -> Settings:
    kind = rng.choice([True, False, "bat", "mini"])
    return {"r": 8 if kind in ("bat", "mini") else rng.choice([5, 8]), "mini_r": 8, "init_weights": kind}


def _glora(rng: Random) -> Settings:
    kinds = ["lora", "vector", "none", "constant"]
    paths = {"config_A_B": kinds, "config_C": kinds[:3], "config_D_E": kinds[1:]}
    return {"r": 3, **{path: rng.choice(known) for path, known in paths.items()}}


def _psoft(rng: Random) -> Settings:
    free = rng.random() < 0.3
    given = {"r": 4, "ab_svd_init": rng.choice(["psoft_init", "pissa_init"]), "psoft_orth": not free}
    magnitudes = {"psoft_mag_a": rng.random() < 0.5, "psoft_mag_b": rng.random() < 0.5}
    return {**given, **magnitudes, "psoft_alpha": 4, "use_cayley_neumann": not free and rng.random() < 0.5}


def _lokr(rng: Random) -> Settings:
    given = {"r": rng.choice([2, 8]), "alpha": rng.choice([4, 8]), "decompose_both": rng.random() < 0.5}
    return {**given, "decompose_factor": rng.choice([-1, 4, 8]), **_PATTERNS}


def _supertuning(rng: Random) -> Settings:
    rank: Settings = rng.choice([{}, {"r": 4}, {"r": 4, "lora_alpha": 6}])
    return {"sparsity": rng.choice([0.9, 0.95]), "select_top": rng.random() < 0.5, **rank}


def _randlora(rng: Random) -> Settings:
    kind: Settings = rng.choice([{}, {"sparse": True}, {"very_sparse": True}])
    return {"r": rng.choice([4, 5]), "randlora_alpha": rng.choice([20, 40]), **kind}


DRAWS: dict[type[PeftConfig], Callable[[Random], Settings]] = {
    peft.LoraConfig: _lora,
    peft.PeanutConfig: lambda rng: {
        "r": 4, "depth": rng.choice([0, 2, 4]), "act_fn": rng.choice(["relu", "gelu", "tanh"]),
        "scaling": 0.5, "init_weights": False,
    },
    peft.AdaLoraConfig: _adalora,
    peft.VeraConfig: lambda rng: {"r": rng.choice([3, 4]), "save_projection": rng.random() < 0.6},
    peft.PveraConfig: lambda rng: {"r": rng.choice([3, 4]), "save_projection": rng.random() < 0.6},
    peft.VBLoRAConfig: lambda rng: {
        "r": 4, "num_vectors": 20, "vector_length": rng.choice([4, 8]), "topk": rng.choice([2, 3]),
        "save_only_topk_weights": rng.random() < 0.5,
    },
    peft.UniLoraConfig: lambda rng: {
        "r": 4, "theta_d_length": rng.choice([40, 64]), "save_indices": rng.random() < 0.8,
    },
    peft.TinyLoraConfig: lambda rng: {"r": rng.choice([2, 3]), "u": 5, "weight_tying": rng.choice([0.0, 0.5, 1.0])},
    peft.MissConfig: _miss,
    peft.GraloraConfig: lambda rng: {
        "r": 4, "alpha": rng.choice([4, 6]), "gralora_k": rng.choice([1, 2, 4]), "hybrid_r": rng.choice([0, 3]),
    },
    peft.DeloraConfig: lambda rng: {
        "r": 4, "delora_lambda": rng.choice([3, 15]), "rank_pattern": {}, "lambda_pattern": {},
    },
    peft.LoHaConfig: lambda rng: {"r": rng.choice([3, 6]), "alpha": rng.choice([4, 6]), **_PATTERNS},
    peft.LoKrConfig: _lokr,
    peft.HRAConfig: lambda rng: {"r": rng.choice([3, 4]), "apply_GS": rng.random() < 0.5},
    peft.DeftConfig: _deft,
    peft.OSFConfig: lambda rng: {"effective_rank": rng.choice([None, 0.8, 12])},
    SaidPsoftConfig: _psoft,
    peft.FrodConfig: lambda rng: {"progressbar": False, "sparse_rate": rng.choice([0.01, 0.05])},
    peft.AdamssConfig: lambda rng: {
        "r": rng.choice([8, 12]), "num_subspaces": rng.choice([3, 5]), "subspace_rank": rng.choice([1, 2]),
        "use_dynamic_rank": rng.random() < 0.3, "init_weights": rng.choice(["orthogonal", None]),
    },
    peft.HiraConfig: lambda rng: {"r": rng.choice([3, 4]), "rank_pattern": {}},
    peft.GloraConfig: _glora,
    peft.OFTConfig: _oft,
    peft.BOFTConfig: _boft,
    peft.RoadConfig: lambda rng: {"variant": f"road_{rng.choice([1, 2, 4])}", "group_size": rng.choice([4, 8])},
    peft.FourierFTConfig: lambda rng: {
        "n_frequency": 50, "scaling": rng.choice([20.0, 150.0]), "random_loc_seed": rng.choice([1, 777]),
        "n_frequency_pattern": {},
    },
    peft.WaveFTConfig: lambda rng: {
        "n_frequency": 50, "wavelet_family": rng.choice(["db1", "sym4", "coif1", "db4"]),
        "use_idwt": rng.random() < 0.7, "random_loc_seed": rng.choice([1, 777]),
        "proportional_parameters": rng.random() < 0.3, "n_frequency_pattern": {},
    },
    peft.C3AConfig: lambda rng: {
        "block_size": rng.choice([4, 8]), "block_size_pattern": {},
    },
    peft.ShiraConfig: lambda rng: {"r": 2, "random_seed": rng.choice([None, 3])},
    peft.SupertuningConfig: _supertuning,
    peft.RandLoraConfig: _randlora,
    peft.IA3Config: lambda rng: {"init_ia3_weights": rng.random() < 0.5},
    peft.BeftConfig: lambda rng: {},
    peft.LNTuningConfig: lambda rng: {},
    peft.TrainableTokensConfig: lambda rng: {"token_indices": rng.sample(range(90), 3)},
}  # fmt: skip


# class of the config -> PEFT's name of the method
NAMES = {
    config_class: config_class.__name__.removeprefix("Said").removesuffix("Config").upper() for config_class in DRAWS
}
NAMES[peft.LNTuningConfig], NAMES[peft.TrainableTokensConfig] = "LN_TUNING", "TRAINABLE_TOKENS"
ROUND = [*DRAWS, *[peft.LoraConfig] * 6]  # one of each, and more of what people use most
