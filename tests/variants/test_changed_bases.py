"""Adapters that were trained on another shape of the base than the engine has."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_models import tiny_llama

from converters.models.checkpoint import open_checkpoint
from peanut_serve.errors import VariantError
from peanut_serve.variants.lora_export import LoraLimits
from peanut_serve.variants.opening import VersionOpener, adapter_version
from peanut_serve.variants.version import LoadedModel

LIMITS = LoraLimits(8, frozenset({"q_proj", "lm_head"}), "fp32")


@pytest.mark.parametrize("lora", [None, LIMITS])
@pytest.mark.parametrize("change", ["layers were stacked", "vocabulary was resized from 96 to 100"])
def test_a_variant_of_another_shape_is_refused(tmp_path: Path, change: str, lora: LoraLimits | None) -> None:
    """As many layers as the base has are no better: they are others."""
    torch.manual_seed(0)
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    stacked = "layers" in change
    if not stacked:
        model.resize_token_embeddings(100)
    settings = {"layer_replication": [[1, 2], [0, 1]]} if stacked else {}
    config = LoraConfig(r=2, target_modules=["q_proj"] if stacked else ["lm_head"], **settings)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    base = open_checkpoint(tmp_path / "base")
    opener = VersionOpener(LoadedModel(base, [[name] for name in base.tensors]), "cpu", lora)
    with pytest.raises(
        VariantError, match=f"a base whose {change}.* before the training, so it does not fit the model"
    ):
        adapter_version("task", tmp_path / "adapter", opener)
