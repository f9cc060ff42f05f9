"""Adapters of programs that are not read are refused with what they are and what to do, by their keys or files.

The keys are written by hand, after the sources of those programs; none of them runs here.
"""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from support.peft_methods import tiny_gpt2, train
from support.tiny_models import save_adapter, tiny_llama

from converters import load_adapter
from converters.errors import LayoutError, PeanutError

LAYER = "model.layers.0.self_attn.q_proj"
UNET = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
IMAGES = "generator of images or videos.*merge it with diffusers"
FOREIGN: dict[str, tuple[list[str], str]] = {
    "torchtune": (
        ["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"],
        r"in torchtune's own names.*order of Meta's rotary embedding.*FullModelHFCheckpointer",
    ),
    "torchtune's head": (["output.lora_a.weight", "output.lora_b.weight"], "in torchtune's own names"),
    "torchtune's DoRA": (["decoder.layers.0.layer.attn.q_proj.magnitude"], "in torchtune's own names"),
    "mistral": (["layers.0.attention.wq.lora_A.weight", "layers.0.attention.wq.lora_B.weight"], "mistral-finetune"),
    "kohya": (
        ["lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"],
        f"kohya's scripts.*{IMAGES}",
    ),
    "kohya's LoHa": ([f"lora_unet_{UNET}.hada_w1_a", f"lora_unet_{UNET}.alpha"], f"kohya's scripts.*{IMAGES}"),
    "kohya's LoKr of SDXL": (["lora_te2_text_model_encoder_layers_0_mlp_fc1.lokr_w1"], f"kohya's scripts.*{IMAGES}"),
    "lycoris": (["lycoris_model_layers_0_mlp_up_proj.hada_w1_a"], "keys of LyCORIS.*underscores.*merge_to"),
    "diffusers": (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], f"diffusers or ComfyUI.*{IMAGES}"),
    "diffusers' text": (["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight"], IMAGES),
    "old diffusers": (["mid_block.attentions.0.attn1.processor.to_q_lora.down.weight"], IMAGES),
    "flux": (["transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight"], IMAGES),
    "comfyui": (["diffusion_model.double_blocks.0.img_attn.proj.lora_down.weight"], IMAGES),
    "megatron": (
        ["decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight"],
        "NeMo or Megatron.*export it",
    ),
    "nemo": (["model.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight"], "NeMo or Megatron"),
    "litgpt": (["transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B"], "LitGPT's names.*merge_lora"),
    "loralib": (
        [f"{LAYER}.lora_A", f"{LAYER}.lora_B"],
        r"loralib or OpenDelta.*adapter_config\.json with peft_type LORA",
    ),
    "opendelta": (
        ["bert.encoder.layer.0.attention.self.query.lora.lora_A"],
        "loralib or OpenDelta.*without its scale",
    ),
    "dotted up and down": ([f"{LAYER}.lora_up.weight", f"{LAYER}.alpha"], "lora_down and lora_up.*rename each key"),
    "adapterhub": (["bert.encoder.layer.0.output.adapters.sst.adapter_down.0.weight"], "AdapterHub's `adapters`"),
    "pyreft": (
        ["rotate_layer.parametrizations.weight.original", "learned_source.weight"],
        "ReFT.*serve it with pyreft",
    ),
    "p-tuning": (["transformer.prefix_encoder.embedding.weight"], "P-Tuning v2.*cannot be merged"),
}


@pytest.mark.parametrize("library", FOREIGN)
def test_keys_that_are_not_read_are_named(tmp_path: Path, library: str) -> None:
    keys, message = FOREIGN[library]
    save_file({key: torch.ones(4, 4) for key in keys}, tmp_path / "adapter_0.safetensors")
    with pytest.raises(LayoutError, match=message) as raised:
        load_adapter(tmp_path)
    assert any(f" (its keys: {key}, ...)" in str(raised.value) for key in keys)


def test_a_config_of_peft_beside_them_makes_no_difference(tmp_path: Path) -> None:
    """torchtune writes one beside its own adapter."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save({key: torch.ones(4, 4) for key in FOREIGN["torchtune"][0]}, tmp_path / "adapter_0.pt")
    with pytest.raises(LayoutError, match="in torchtune's own names"):
        load_adapter(tmp_path)


FILES = {
    "lora.gguf": r"is GGUF, for llama\.cpp.*llama-export-lora merges it",
    "lora.nemo": "is an archive of NVIDIA's NeMo; merge it there, or export it",
    "adapters.npz": "is NumPy's, as early examples of MLX",
    "lora.weights.h5": "is Keras'.*give the adapter in the form in which it was trained",
    "flax_model.msgpack": "is Flax'.*as safetensors",
}


@pytest.mark.parametrize("given", ["file", "folder", "with a config"])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_read_are_named(tmp_path: Path, name: str, given: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    if given == "with a config":
        (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LayoutError, match=FILES[name]):
        load_adapter(tmp_path / name if given == "file" else tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["intkey_layer.3#0.bin", "intkey_layer.5#0.bin", "config.json"],
            "pyreft.*cannot be merged; serve it with pyreft",
        ),
        (["context/model.yaml", "weights/__0_0.distcp"], "NVIDIA's NeMo; merge it there"),
        (["latest_checkpointed_iteration.txt", "iter_0000010/__0_0.distcp"], "a checkpoint of Megatron"),
        (["mp_rank_00/model_weights.ckpt"], "a checkpoint of Megatron"),
    ],
)
def test_folders_that_are_not_read_are_named(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(LayoutError, match=message):
        load_adapter(tmp_path)


def test_other_files_beside_an_adapter_make_no_difference(tmp_path: Path) -> None:
    save_adapter(tiny_llama(), tmp_path)
    (tmp_path / "lora.gguf").write_bytes(b"GGUF")
    assert load_adapter(tmp_path).layout == "hf-peft"


def test_names_that_peft_has_as_well_are_its_own_beside_its_config(tmp_path: Path) -> None:
    """PEFT's AdaLoRA names its factors as loralib does, without `.weight`."""
    config = peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["c_attn"], fan_in_fan_out=True)
    train(tiny_gpt2(), config, tmp_path / "base", tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter").layout == "hf-peft"


def test_what_nobody_knows_shows_its_keys(tmp_path: Path) -> None:
    save_file({"a.strange.key": torch.ones(4, 4)}, tmp_path / "weights.safetensors")
    with pytest.raises(PeanutError, match=r"no θ in a known layout \(its keys: a\.strange\.key"):
        load_adapter(tmp_path)
