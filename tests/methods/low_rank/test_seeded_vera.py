"""VeRA whose random projections were not saved: what is drawn again depends on the shapes of the base."""

from pathlib import Path

import pytest
import torch
from peft import VeraConfig
from support.method_zoo import CASES
from support.peft_methods import MODELS, close, logits, reloaded, train
from support.tiny_models import edit_json, edit_weights, tiny_llama
from transformers import LlamaForCausalLM

from converters import Weighted, load_adapter, merge, prepare_merge
from converters.errors import ConversionError, ThetaError
from converters.methods.low_rank import seeded_vera


def trained(folder: Path, targets: list[str]) -> Path:
    config = VeraConfig(r=4, save_projection=False, projection_prng_key=7, target_modules=targets)
    train(MODELS["llama"](), config, folder / "base", folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "down_proj"], ["up_proj", "down_proj", "v_proj"]])
def test_the_largest_of_the_adapted_weights_counts(targets: list[str], tmp_path: Path) -> None:
    adapter = trained(tmp_path, targets)
    wanted = logits(reloaded(tiny_llama(), tmp_path / "base", adapter))
    opened = load_adapter(adapter)
    plan = prepare_merge(tmp_path / "base", opened)
    assert plan.adapters[0].adapter.digest == opened.digest
    merge(tmp_path / "base", opened, tmp_path / "merged")
    assert close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)), wanted)


def test_each_adapter_of_a_sum_has_its_own_sizes(tmp_path: Path) -> None:
    one, two = (load_adapter(trained(tmp_path / name, [name])) for name in ("q_proj", "down_proj"))
    plan = prepare_merge(tmp_path / "q_proj" / "base", [Weighted(one), Weighted(two)])
    sizes = [weighted.adapter.describe(next(iter(weighted.adapter.modules))).settings for weighted in plan.adapters]
    assert [(found["largest_out"], found["largest_in"]) for found in sizes] == [(32, 32), (32, 72)]


def test_without_a_base_there_are_no_projections(tmp_path: Path) -> None:
    opened = load_adapter(trained(tmp_path, ["q_proj"]))
    with pytest.raises(ConversionError, match="drawn for the largest weights of its base, which is not known here"):
        opened.method("model.layers.0.self_attn.q_proj").delta(torch.zeros(32, 32))


def test_another_generator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = trained(tmp_path, ["q_proj"])
    monkeypatch.setattr(seeded_vera, "_FIRST", (0.1, 0.2, 0.3))
    seeded_vera._projections.cache_clear()
    with pytest.raises(ThetaError, match="draws other numbers from a seed.*save_projection=True"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_projections_that_the_config_denies(tmp_path: Path) -> None:
    """HF PEFT would ignore them."""
    train(MODELS["llama"](), CASES["vera"].on("llama"), tmp_path / "base", tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", save_projection=False)
    with pytest.raises(ThetaError, match=r"vera_A does not have PEFT's form"):
        load_adapter(tmp_path / "adapter")


def test_projections_that_are_missing(tmp_path: Path) -> None:
    train(MODELS["llama"](), CASES["vera"].on("llama"), tmp_path / "base", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    edit_weights(file, lambda weights: {key: tensor for key, tensor in weights.items() if "vera_A" not in key})
    with pytest.raises(ThetaError, match="vera_A is missing; the adapter is incomplete"):
        load_adapter(tmp_path / "adapter")
