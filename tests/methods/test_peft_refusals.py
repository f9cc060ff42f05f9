"""Adapters of PEFT's methods that are damaged or incomplete, or whose settings no weight can follow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from support.damage import changed, without
from support.method_zoo import CASES, TARGETS
from support.peft_methods import MODELS, close, logits, reloaded, train
from support.tiny_models import edit_json, edit_weights, tiny_llama

from converters import load_adapter, merge
from converters.errors import (
    AdapterConfigError,
    BaseMismatchError,
    LayoutError,
    OptionError,
    ThetaError,
)


def trained(tmp_path: Path, config: PeftConfig, model: str = "llama") -> Path:
    train(MODELS[model](), config, tmp_path / "base", tmp_path / "adapter")
    return tmp_path / "adapter"


LLAMA = {"target_modules": TARGETS["llama"]}

# what PEFT can be told to leave out, and noise
LEFT_OUT: dict[str, tuple[PeftConfig, str]] = {
    "randlora": (peft.RandLoraConfig(r=4, save_projection=False, **LLAMA), "randlora_A is missing.*save_projection"),
    "unilora": (
        peft.UniLoraConfig(r=4, theta_d_length=40, **LLAMA),
        "indices were not saved.*NumPy",
    ),
    "tinylora": (
        peft.TinyLoraConfig(r=3, u=5, save_projection=False, **LLAMA),
        'tinylora_P is missing.*"save_projection" to true',
    ),
    "tinylora one": (
        peft.TinyLoraConfig(r=3, u=5, weight_tying=1.0, save_projection=False, **LLAMA),
        'tinylora_P is missing.*"save_projection" to true',
    ),
    "frod": (
        peft.FrodConfig(save_projection=False, progressbar=False, **LLAMA),
        "frod_V is missing.*save_projection",
    ),
    "psoft": (peft.PsoftConfig(r=4, **LLAMA), 'does not save the signs.*"svd_backend": "mkl"'),
    "psoft lowrank": (peft.PsoftConfig(r=4, psoft_svd="lowrank", **LLAMA), "what it draws depends on"),
    "supertuning": (
        peft.SupertuningConfig(save_precomputed_indices=False, **LLAMA),
        'supertuning_indices is missing.*set "save_precomputed_indices" to true',
    ),
    "noise": (peft.PveraConfig(r=4, sample_at_inference=True, **LLAMA), "no merged weight does"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_was_not_saved(tmp_path: Path, case: str) -> None:
    config, message = LEFT_OUT[case]
    with pytest.raises((AdapterConfigError, ThetaError), match=message):
        load_adapter(trained(tmp_path, config))


# what the refusals advise; PEFT refuses to load FRoD in this way
CURES = {
    "unilora": "save_indices",
    "randlora": "save_projection",
    "tinylora": "save_projection",
    "supertuning": "save_precomputed_indices",
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c == "unilora" else pytest.mark.slow) for c in CURES])
def test_the_cure_for_what_was_not_saved(tmp_path: Path, case: str) -> None:
    adapter, base, plain = trained(tmp_path, LEFT_OUT[case][0]), tmp_path / "base", tiny_llama()
    wanted = logits(reloaded(plain, base, adapter))
    as_it_is = reloaded(plain, base, adapter)  # the field of a loaded model has no effect
    setattr(as_it_is.peft_config["default"], CURES[case], True)
    as_it_is.save_pretrained(tmp_path / "incomplete")
    with pytest.raises(ThetaError, match=f'set "{CURES[case]}" to true in its adapter_config'):
        load_adapter(tmp_path / "incomplete")
    edit_json(adapter / "adapter_config.json", **{CURES[case]: True})
    reloaded(plain, base, adapter).save_pretrained(tmp_path / "whole")
    merge(base, tmp_path / "whole", tmp_path / "merged")
    found = logits(type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    assert close(found, wanted)


# case of the zoo -> change of the config -> message
CONFIGS = {
    "another rank": ("hira", {"r": 5}, "θ has r = 4, the config says r = 5"),
    "another rank by pattern": ("loha", {"rank_pattern": {"v_proj": 7}}, "θ has r = 3, the config says r = 7"),
    "a pattern of nonsense": ("loha", {"rank_pattern": {"(": 7}}, "not a valid regular expression"),
    "a rank of nonsense": ("vera", {"r": "4"}, "r = '4'; expected an integer"),
    "a missing field": ("gralora", {"hybrid_r": None}, "hybrid_r = None; expected an integer"),
    "another hybrid": ("gralora", {"hybrid_r": 2}, "hybrid_r is 2, which does not agree with"),
    "another topk": ("vblora topk", {"topk": 2}, "topk is 2"),
    "logits that are not there": ("vblora topk", {"save_only_topk_weights": False}, "vblora_logits_A is missing"),
    "too many of the bank": ("vblora", {"topk": 21}, "topk is 21"),
    "an unknown setting": ("hra", {"rotate": True}, "'rotate' = True is not a setting known"),
    "biases of nonsense": ("hra", {"bias": "some"}, "bias = 'some'; expected none, all, or <method>_only"),
    "an older PEFT": ("oft", {"peft_version": None}, "before PEFT 0.18"),
    "another block": ("oft", {"block_share": True}, r"R has shape \(9, 28\); expected"),
    "an unknown variant": ("road 1", {"variant": "road_3"}, "variant = 'road_3'; known are"),
    "a variant of nonsense": ("road 1", {"variant": ["road_1"]}, r"variant = \['road_1'\]; known are"),
    "another group": ("road 1", {"group_size": 10}, "no whole groups of 10 outputs"),
    "another tie": ("tinylora tied", {"weight_tying": 2}, "weight_tying = 2; expected a number from 0 to 1"),
    "another tie by number": ("tinylora tied", {"weight_tying": 0.0}, "tinylora_v is missing"),
    "another vector": ("tinylora", {"u": 4}, "v has 5 numbers, the config says u = 4"),
    "another rank of TinyLoRA": ("tinylora", {"r": 4}, "θ has r = 3, the config says r = 4"),
    "another seed": ("tinylora", {"projection_seed": 7}, "none of those that projection_seed 7 gives"),
    "another OSF": (
        "osf",
        {"effective_rank": 12, "rank_pattern": None},
        "θ replaces 16 of 32 singular values, the con",
    ),
    "another OSF by pattern": ("osf", {"rank_pattern": {"q_.*": 9, "q_proj": 8}}, "θ replaces 24 of 32 .* keeps 9"),
    "an OSF of nonsense": ("osf", {"effective_rank": "half"}, "effective_rank = 'half'; expected a finite number"),
    "another target": (
        "osf",
        {"target_svd_config": {"q_proj.weight": 8}},
        "'target_svd_config' = .* is not a setting",
    ),
    "another rank of PSOFT": ("psoft", {"r": 5}, r"θ has shape \(6,\), and 4 scales; expected \(10,\) and 5"),
    "no rotation": ("psoft", {"psoft_orth": False}, r"θ has shape \(6,\), and 4 scales; expected \(4, 4\)"),
    "no scales": ("psoft", {"psoft_mag_b": False}, "psoft_mag_b is False, θ says otherwise"),
    "an alpha of nothing": ("psoft", {"psoft_alpha": 0}, "psoft_alpha = 0; expected a number above 0"),
    "an unknown start": ("psoft", {"ab_svd_init": "svd"}, "ab_svd_init = 'svd'; known are"),
    "another rank of DEFT": ("deft", {"r": 5}, "θ has r = 4, the config says r = 5"),
    "an unknown decomposition": ("deft", {"decomposition_method": "svd"}, "known are relu and qr"),
    "only removing": ("deft", {"para": True}, "para is true, and there is deft_R"),
    "not only removing": ("deft para", {"para": False}, "para is false, and there is no deft_R"),
    "an unknown wavelet": ("waveft sym4", {"wavelet_family": "db11"}, "'db11' is not a wavelet"),
    "a wavelet PEFT cannot compute": ("waveft sym4", {"wavelet_family": "coif5"}, "'coif5' is not a wavelet"),
    "a wavelet of nonsense": ("waveft", {"wavelet_family": [1]}, r"'\[1\]' is not a wavelet"),
    "no hybrid": ("supertuning supra", {"r": None}, "θ has the factors of the hybrid Supra, but r is null"),
    "a hybrid": (
        "supertuning",
        {"r": 4},
        r"r is 4 \(Supra\), but supertuning_lora_A, supertuning_lora_B are missing",
    ),
    "another sparsity": ("supertuning", {"sparsity": 1.0}, "sparsity = 1; expected a number from 0 to below 1"),
    "an infinite scale": ("fourierft", {"scaling": float("inf")}, "scaling = inf; expected a finite number"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_and_weights_have_to_agree(tmp_path: Path, case: str) -> None:
    name, changes, message = CONFIGS[case]
    adapter = trained(tmp_path, CASES[name].on("llama"))
    load_adapter(adapter)
    edit_json(adapter / "adapter_config.json", **changes)
    with pytest.raises((AdapterConfigError, ThetaError), match=message):
        load_adapter(adapter)


# case of the zoo -> change of the weights -> message
DAMAGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a part is missing": ("adalora", without("layers.1.self_attn.q_proj.lora_E"), "q_proj: lora_E is missing"),
    "the bank is missing": ("vblora", without("vector_bank"), "vblora_vector_bank is missing"),
    "half of a product": ("lokr", without("q_proj.lokr_w1_a"), "θ has w1_b of w1; expected it, or its two factors"),
    "an unknown part": (
        "hra",
        lambda w: {**w, "base_model.model.x.hra_v": torch.zeros(2)},
        "does not have PEFT's form",
    ),
    "transposed": ("hira", changed("hira_A", lambda t: t.T), "θ has r = 72, the config says r = 4"),
    "a vector": ("miss", changed("miss_block", lambda t: t[0, 0].reshape(())), "which are not those of miss"),
    "another shape": (
        "delora",
        changed("w_norm", lambda t: t[1:]),
        r"shape \(71,\); expected A \(r, in\)",
    ),
    "not finite": ("c3a", changed("kernel", lambda t: t / 0), "NaN or Inf"),
    "indices of another type": ("unilora", changed("indices_A", torch.Tensor.float), "float32; expected indices"),
    "indices that are truths": ("unilora", changed("indices_A", torch.Tensor.bool), "bool; expected indices"),
    "numbers of another type": ("hira", changed("hira_A", torch.Tensor.int), "int32; expected floating-point θ"),
    "parts of OSF": ("osf", without("q_proj.osf_svd_params.S_low"), r"q_proj: osf_svd_params\.S_low is missing"),
    "a tail that is not known": (
        "osf",
        lambda w: {**w, "base_model.model.x.osf_svd_params.S_high": torch.zeros(2)},
        "does not have PEFT's form",
    ),
    "fewer parts of OSF": ("osf", changed("q_proj.osf_svd_params.U_low", lambda t: t[:, 1:]), "expected U"),
    "a projection is missing": ("frod", without("frod_V.self_attn_q_proj"), "q_proj: frod_V is missing"),
    "a projection of nothing": (
        "frod",
        lambda w: {**w, "base_model.frod_V.mlp_up_proj": torch.eye(32)},
        r"frod_V\.mlp_up_proj \(V\) belongs to none of the adapted modules",
    ),
    "butterflies": ("boft", changed("boft_R", lambda t: t.repeat(2, 1, 1, 1)), "2 butterfly factors"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_weights(tmp_path: Path, case: str) -> None:
    name, change, message = DAMAGES[case]
    adapter = trained(tmp_path, CASES[name].on("llama"))
    edit_weights(adapter / "adapter_model.safetensors", change)
    with pytest.raises(ThetaError, match=message):
        load_adapter(adapter)


@pytest.mark.parametrize(
    ("name", "mark", "index", "message"),
    [
        ("unilora", "indices_B", -1, "has indices from -1 to .*; expected 0 to 39"),
        ("unilora", "indices_A", 40, "to 40; expected 0 to 39"),
        ("vblora topk", "A_topk_indices", 20, "to 20; expected 0 to 19"),
        ("shira", "indices", 72, "to 72; expected 0 to"),
        ("supertuning", "indices", -1, "from -1 to .*; expected 0 to"),
        ("supertuning", "indices", 72 * 72, "expected 0 to"),
    ],
)
def test_indices_out_of_range(tmp_path: Path, name: str, mark: str, index: int, message: str) -> None:
    adapter = trained(tmp_path, CASES[name].on("llama"))

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = index
        return tensor

    edit_weights(adapter / "adapter_model.safetensors", changed(mark, change))
    with pytest.raises(ThetaError, match=message):
        merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# of these, θ does not say what size of weight it was trained for
OF_ANY_SIZE = {
    "fourierft", "waveft", "waveft sym4", "waveft without idwt", "shira", "road 1", "road 2", "road 4", "psoft",
    "psoft series", "psoft free",
}  # fmt: skip


# larger in every size, so that nothing that has to fit fits by chance
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - OF_ANY_SIZE))
def test_another_base_is_refused(tmp_path: Path, name: str) -> None:
    adapter = trained(tmp_path, CASES[name].on("llama"))
    tiny_llama(hidden_size=44, intermediate_size=84, num_attention_heads=2).save_pretrained(tmp_path / "larger")
    with pytest.raises(BaseMismatchError):
        merge(tmp_path / "larger", adapter, tmp_path / "merged")


def test_what_modules_share_is_counted_once(tmp_path: Path) -> None:
    adapter = trained(tmp_path, CASES["vera"].on("llama"))
    assert load_adapter(adapter).parameter_count == sum(
        tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values()
    )


def test_a_scaling_is_not_asked_for(tmp_path: Path) -> None:
    adapter = trained(tmp_path, CASES["loha"].on("llama"))
    with pytest.raises(OptionError, match="LOHA needs; leave it out"):
        load_adapter(adapter, scaling=2.0)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(LayoutError, match=r"there is no adapter_config\.json next to it"):
        load_adapter(adapter)


def test_adalora_whose_ranks_were_pruned(tmp_path: Path) -> None:
    """As PEFT saves it at the end: fewer rows, one module with none, and the scale of the rank at the beginning."""
    adapter = trained(tmp_path, CASES["adalora"].on("llama"))
    pattern: dict[str, Any] = {}

    def prune(weights: dict[str, torch.Tensor]) -> None:
        for key in sorted(weights):
            if key.endswith("lora_E"):
                keep = [False] * 4 if "layers.1.self_attn.v_proj" in key else [True, False, True, False]
                pattern[key.removeprefix("base_model.model.")] = keep
                module = key.removesuffix("lora_E")
                for part in ("lora_E", "lora_A"):
                    weights[module + part] = weights[module + part][torch.tensor(keep)].contiguous()
                weights[f"{module}lora_B"] = weights[f"{module}lora_B"][:, torch.tensor(keep)].contiguous()

    edit_weights(adapter / "adapter_model.safetensors", prune)
    edit_json(adapter / "adapter_config.json", rank_pattern=pattern)
    wanted = logits(reloaded(tiny_llama(), tmp_path / "base", adapter))
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    found = logits(type(tiny_llama()).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    assert close(found, wanted)
    assert load_adapter(adapter).rank("model.layers.0.self_attn.q_proj") == 2
