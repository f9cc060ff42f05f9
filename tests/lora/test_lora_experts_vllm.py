"""vLLM's own reader of LoRA adapters packs a module per expert as it multiplies them: no expert is lost or swapped.

The kernels themselves need a GPU: on the CPU, vLLM 0.32 computes no LoRA on experts.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import save_per_expert, tiny_qwen3_moe

from converters import prepare_merge
from converters.outputs.lora import LoraOptions, plan_lora_adapter, write_lora_adapter

OWNER = "model.layers.0.mlp.experts"


@pytest.mark.vllm
def test_vllm_packs_every_expert(tmp_path: Path) -> None:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper

    base, adapter, lora = tmp_path / "base", tmp_path / "adapter", tmp_path / "lora"
    tiny_qwen3_moe().save_pretrained(base)
    save_per_expert(base, adapter, "lora")
    write_lora_adapter(plan_lora_adapter(prepare_merge(base, adapter), lora, options=LoraOptions(runtime="vllm")))
    # of each expert w1, w2 and w3, in the order of `get_moe_expert_mapping`
    kinds = ["gate_proj", "down_proj", "up_proj"]
    names = [f"experts.{expert}.{kind}" for expert in range(4) for kind in kinds]
    helper = PEFTHelper.from_local_dir(str(lora), None)
    loaded = LoRAModel.from_local_checkpoint(
        str(lora), {*names, "q_proj"}, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    loras = [loaded.loras[f"{OWNER.removesuffix('experts')}{name}"] for name in names]
    packed = PackedLoRALayerWeights.pack_moe(loras, OWNER).optimize()
    given = load_file(adapter / "adapter_model.safetensors")
    for place, kind in enumerate(kinds):
        for expert in range(4):
            key = f"base_model.model.{OWNER}.{expert}.{kind}"
            wanted = 2.0 * given[f"{key}.lora_B.weight"] @ given[f"{key}.lora_A.weight"]
            found = packed.lora_b[place][expert] @ packed.lora_a[place][expert]
            assert torch.allclose(found.float(), wanted, atol=1e-5)
