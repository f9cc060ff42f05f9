"""Adapters of parameters, served as LoRA: what vLLM is started with, and what it gets."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import save_on_parameters, save_per_expert, tiny_gpt_oss, tiny_qwen3_moe

from converters import prepare_merge
from converters.errors import OptionError
from converters.outputs.lora import LoraOptions, plan_lora_adapter, write_lora_adapter
from peanut_serve.cli.finding import find_adapters
from peanut_serve.lora.cache import LoraCache
from peanut_serve.lora.exporter import LoraExporter
from peanut_serve.variants.lora_export import LoraLimits
from peanut_serve.variants.roots import AdapterRoots
from peanut_serve.vllm_plugin.lora.cpu_experts import refuse_experts_on_cpu

OWNER = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("form", ["parameters", "modules"])
def test_vllm_is_told_to_adapt_experts(form: str, tmp_path: Path) -> None:
    """It has one module for those of a layer, and leaves them out in silence if that is no target."""
    model, adapter = tiny_qwen3_moe(), tmp_path / "tasks" / "one"
    model.save_pretrained(tmp_path / "base")
    adapter.parent.mkdir()
    if form == "parameters":
        save_on_parameters(model, adapter, r=4, target_modules=["q_proj"])
    else:
        save_per_expert(tmp_path / "base", adapter, "lora")
    roots = AdapterRoots([tmp_path / "tasks"])
    found = find_adapters(roots)
    assert (found.ranks, found.kinds, found.not_lora) == ({"one": 4}, {"experts", "q_proj"}, {})
    exporter = LoraExporter(str(tmp_path / "base"), LoraCache(tmp_path / "cache", 10**9))
    exported = exporter.export(roots.find("one"))
    assert (exported.r, exported.kinds) == (4, {"experts", "q_proj"})
    refusal = LoraLimits(16, frozenset({"q_proj", "gate_up_proj", "down_proj"})).refusal(exported.r, exported.kinds)
    assert refusal == "it updates experts, which vLLM's --lora-target-modules does not include"


@pytest.mark.parametrize("name", ["mixtral", "text_config", "llama"])
def test_experts_with_lora_are_refused_on_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"mixtral": {"num_local_experts": 8}, "text_config": {"text_config": {"num_experts": 8}}, "llama": {}}
    (tmp_path / "config.json").write_text(json.dumps(config[name]))
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    refuse_experts_on_cpu(str(tmp_path))
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    refuse_experts_on_cpu("org/base")  # vLLM downloads it later
    if name == "llama":
        refuse_experts_on_cpu(str(tmp_path))
    else:
        with pytest.raises(OptionError, match=r"is a mixture of experts \(num_.*experts = 8\), which vLLM 0.32 does"):
            refuse_experts_on_cpu(str(tmp_path))


@pytest.mark.vllm
def test_vllm_stacks_the_experts_of_gpt_oss(tmp_path: Path) -> None:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

    base, adapter, lora = tmp_path / "base", tmp_path / "adapter", tmp_path / "lora"
    model = tiny_gpt_oss()
    model.save_pretrained(base)
    ranks = {r".*\.mlp\.experts\.down_proj": 2}
    save_on_parameters(model, adapter, target_modules=["q_proj"], rank_pattern=ranks)
    write_lora_adapter(plan_lora_adapter(prepare_merge(base, adapter), lora, options=LoraOptions(runtime="vllm")))
    loaded = LoRAModel.from_local_checkpoint(
        str(lora),
        {"experts", "q_proj"},
        PEFTHelper.from_local_dir(str(lora), None),
        lora_model_id=1,
        device="cpu",
        dtype=torch.float32,
        weights_mapper=GptOssForCausalLM.hf_to_vllm_mapper.get_rename_mapper(),
    )
    for one in loaded.loras.values():
        one.optimize()
    manager = SimpleNamespace(_get_lora_layer_weights=lambda loras, name: loras.loras[name], _is_3d_moe_model=True)
    module = SimpleNamespace(w13_lora_a_stacked=[torch.zeros(1, 4)], global_num_experts=4, ep_rank=0)
    LoRAModelManager._stack_moe_lora_weights(manager, loaded, module, OWNER)
    given, stacked = load_file(adapter / "adapter_model.safetensors"), loaded.loras[OWNER]
    for place, (wrapped, r) in enumerate({".base_layer": 3, "": 2}.items()):
        a, b = (given[f"base_model.model.{OWNER}{wrapped}.lora_{x}.weight"] for x in "AB")
        for expert in range(4):
            wanted = 5 / r * b[:, expert::4] @ a[expert * r : (expert + 1) * r]
            found = stacked.lora_b[place][expert] @ stacked.lora_a[place][expert]
            assert torch.allclose(found, wanted, atol=1e-5)
