"""Adapters that mlx-lm trained and saved, against the logits that MLX computes with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.paths import DATA
from support.peft_methods import IDS, close, logits
from support.tiny_models import edit_json, edit_weights
from transformers import LlamaForCausalLM

from converters import load_adapter, merge, open_checkpoint
from converters.adapters.base_record import check_base
from converters.errors import AdapterConfigError, BaseMismatchError, LayoutError, OptionError, PeanutError, ThetaError

MLX = DATA / "mlx-lm"
KINDS = ("lora", "dora")
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("kind", KINDS)
def test_merged_logits_are_those_of_mlx(tmp_path: Path, kind: str) -> None:
    adapter = load_adapter(MLX / kind)
    assert (adapter.layout, adapter.base_name) == ("mlx", "golden/base")
    assert {module.split(".")[2] for module in adapter.modules} == {"1"}  # --num-layers 1
    merge(MLX / "base", MLX / kind, tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    wanted = load_file(MLX / "expected_logits.safetensors")[kind].double()
    assert IDS.shape == wanted.shape[:2]
    assert close(logits(merged), wanted)
    assert not close(logits(LlamaForCausalLM.from_pretrained(MLX / "base", dtype=torch.float32).eval()), wanted)


def test_the_digest_is_that_of_the_same_lora_in_peft(tmp_path: Path) -> None:
    """θ is the same, whichever way round it lies on the disk."""
    theta = load_file(MLX / "lora" / "adapters.safetensors")
    names = {key: key.replace(".lora_a", ".lora_A.weight").replace(".lora_b", ".lora_B.weight") for key in theta}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 40.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save({names[key]: tensor.T for key, tensor in theta.items()}, tmp_path / "adapter_model.bin")
    assert load_adapter(tmp_path).digest == load_adapter(MLX / "lora").digest


def test_a_checkpoint_of_the_training_is_read_by_its_path() -> None:
    later = load_adapter(MLX / "lora")
    earlier = load_adapter(MLX / "lora" / "0000020_adapters.safetensors")
    assert earlier.modules.keys() == later.modules.keys()
    assert earlier.digest != later.digest


def test_weights_alone_need_the_scale(tmp_path: Path) -> None:
    for kind in KINDS:
        shutil.copy(MLX / kind / "adapters.safetensors", tmp_path / f"{kind}.safetensors")
        with pytest.raises(OptionError, match="only that states the scale: give scaling="):
            load_adapter(tmp_path / f"{kind}.safetensors")
        scale = json.loads((MLX / kind / "adapter_config.json").read_text())["lora_parameters"]["scale"]
        found = load_adapter(tmp_path / f"{kind}.safetensors", scaling=scale)
        assert found.digest == load_adapter(MLX / kind).digest
    with pytest.raises(OptionError, match="states the scale; leave it out"):
        load_adapter(MLX / "lora", scaling=1.0)


PARAMETERS = {"rank": 4, "scale": 10.0, "dropout": 0.0}
CONFIGS: dict[str, tuple[dict[str, Any], type[PeanutError], str]] = {
    "full": ({"fine_tune_type": "full"}, LayoutError, "whole weights of some layers, not an adapter"),
    "type": ({"fine_tune_type": "vera"}, AdapterConfigError, "fine_tune_type = 'vera'; known are lora and dora"),
    "dora": ({"fine_tune_type": "dora"}, ThetaError, "m is missing; the adapter is incomplete"),
    "old dora": ({"use_dora": True}, ThetaError, "m is missing; the adapter is incomplete"),
    "unknown": ({"lora_plus": 3}, AdapterConfigError, "'lora_plus' = 3 is not a setting known to this version"),
    "model": ({"model": 3}, AdapterConfigError, "model = 3; expected a name"),
    "none": ({"lora_parameters": None}, AdapterConfigError, "expected an object with rank and scale"),
    "rank": ({"lora_parameters": {**PARAMETERS, "rank": 8}}, ThetaError, "4 columns, the config says rank = 8"),
    "scale": ({"lora_parameters": {"rank": 4}}, AdapterConfigError, "'scale' is missing in lora_parameters"),
    "number": ({"lora_parameters": {**PARAMETERS, "scale": "2"}}, AdapterConfigError, "expected a finite number"),
    "inside": ({"lora_parameters": {**PARAMETERS, "rs": True}}, AdapterConfigError, "'lora_parameters.rs' = True"),
    "alpha": ({"lora_parameters": {**PARAMETERS, "alpha": 16}}, AdapterConfigError, "put what it was trained with"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_changes_the_mathematics_is_refused(tmp_path: Path, case: str) -> None:
    changes, error, message = CONFIGS[case]
    adapter = Path(shutil.copytree(MLX / "lora", tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(error, match=message):
        load_adapter(adapter)


def test_alpha_that_changes_nothing_is_no_matter(tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(MLX / "lora", tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", lora_parameters={**PARAMETERS, "alpha": 4})
    assert load_adapter(adapter).digest == load_adapter(MLX / "lora").digest


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda w: {key.replace(old, new): tensor for key, tensor in w.items()}


WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], type[PeanutError], str]] = {
    "missing": (lambda w: w.pop(f"{Q_PROJ}.lora_b"), ThetaError, "q_proj: lora_b is missing"),
    "extra": (lambda w: {**w, "norm.weight": torch.ones(3)}, ThetaError, "the key norm.weight is not one of LoRA"),
    "quantized": (lambda w: {**w, f"{Q_PROJ}.lora_a_scales": torch.ones(3)}, ThetaError, "lora_a_scales is not one"),
    "magnitude": (lambda w: {**w, f"{Q_PROJ}.m": torch.ones(32)}, ThetaError, "has m, which DoRA has"),
    "swapped": (
        lambda w: {key: tensor.T.contiguous() for key, tensor in w.items()},
        ThetaError,
        r"lora_a has shape \(4, \d+\), lora_b \(\d+, 4\); expected \(in, r\) and \(r, out\)",
    ),
    "embedding": (renamed(Q_PROJ, "model.embed_tokens"), LayoutError, "LoRA on the embedding model.embed_tokens"),
    "experts": (lambda w: {k: t[None].repeat(2, 1, 1) for k, t in w.items()}, LayoutError, "LoRA on the experts"),
    "nothing": (lambda w: {"norm.weight": torch.ones(3)}, ThetaError, "is not one of LoRA or DoRA"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_belong_are_refused(tmp_path: Path, case: str) -> None:
    change, error, message = WEIGHTS[case]
    adapter = Path(shutil.copytree(MLX / "lora", tmp_path / "adapter"))
    edit_weights(adapter / "adapters.safetensors", change)
    with pytest.raises(error, match=message):
        load_adapter(adapter)


def test_names_that_the_base_does_not_have_are_refused(tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(MLX / "lora", tmp_path / "adapter"))
    edit_weights(adapter / "adapters.safetensors", renamed("q_proj", "wq"))
    with pytest.raises(PeanutError, match=r"self_attn\.wq"):
        merge(MLX / "base", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


QUANTIZED = ("Llama-3.2-1B-4bit", "llama-3-8b-bnb-4bit", "gpt-oss-20b-MXFP4-Q8", "Qwen3-8B-AWQ")


@pytest.mark.parametrize("name", [*QUANTIZED, "Llama-3.2-1B", "gpt-4bitter", "Qwen3-8B-Q"])
def test_an_adapter_of_a_quantized_base_says_so(tmp_path: Path, name: str) -> None:
    adapter = Path(shutil.copytree(MLX / "lora", tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", model=f"mlx-community/{name}")
    base = open_checkpoint(MLX / "base")
    (note,) = check_base(base, load_adapter(adapter), force=False)
    assert ("trained on rounded weights" in note) == (name in QUANTIZED)
    object.__setattr__(base, "repo_id", "meta-llama/Llama-3.2-1B-Instruct")
    with pytest.raises(BaseMismatchError) as refused:
        check_base(base, load_adapter(adapter), force=False)
    assert ("trained on rounded weights" in str(refused.value)) == (name in QUANTIZED)
