"""The folders that the documents speak of, as tiny models under the same names."""

import json
import shutil
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from support.golden import GLUE, VISION
from support.tiny_models import save_adapter, tiny_llama
from transformers import LlamaForCausalLM, ViTForImageClassification

import converters

_ATTENTION = "self_attn"


def save_lora_named(folder: Path, shapes: dict[str, tuple[tuple[int, int], tuple[int, int]]]) -> None:
    """A folder with LoRA's names: module -> shapes of lora_A and lora_B, in both layers of the tiny Llama."""
    folder.mkdir()
    targets = [name.rsplit(".", 1)[-1] for name in shapes]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    state = {
        f"base_model.model.model.layers.{i}.{name}.lora_{part}.weight": torch.randn(shape) / 9
        for i in range(2)
        for name, pair in shapes.items()
        for part, shape in zip("AB", pair, strict=True)
    }
    torch.save(state, folder / "adapter_model.bin")


def save_with_mlx(folder: Path) -> None:
    """A folder as mlx-lm saves it, with random weights."""
    folder.mkdir()
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0},
        "num_layers": 1,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = f"model.layers.1.{_ATTENTION}.k_proj"
    theta = {f"{name}.lora_a": torch.randn(32, 2) / 9, f"{name}.lora_b": torch.randn(2, 16) / 9}
    save_file(theta, folder / "adapters.safetensors")


def save_with_peft(base: Path, folder: Path, config: PeftConfig) -> None:
    """An adapter that PEFT saved, with random weights."""
    torch.manual_seed(3)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(folder, save_embedding_layers=False)


def language_folders(folder: Path) -> None:
    """Adapters of a language model, of every training code. The base is there already, as `llama2-7b`."""
    save_adapter(tiny_llama(), folder / "style", seed=2, act_fn="tanh")
    square = ((2, 32), (32, 2))
    save_lora_named(folder / "math14k", {f"{_ATTENTION}.q_proj": square, f"{_ATTENTION}.k_proj": square})
    (folder / "math14k" / "checkpoint-200").mkdir()
    shutil.copy(folder / "math14k" / "adapter_model.bin", folder / "math14k" / "checkpoint-200" / "pytorch_model.bin")
    save_lora_named(folder / "qkv", {f"{_ATTENTION}.q_proj": square})
    save_lora_named(folder / "alpaca", {f"{_ATTENTION}.k_proj": ((2, 32), (16, 2))})
    save_lora_named(folder / "ablation", {f"{_ATTENTION}.k_proj": ((2, 32), (16, 2))})
    save_with_mlx(folder / "mlx")
    sine = converters.Tweaker(converters.Orientation.ROWS, torch.randn(2, 32), torch.randn(32, 2), act_fn="sin_2pi")
    converters.save_adapter(folder / "sine", {f"model.layers.0.{_ATTENTION}.q_proj": sine})
    base, targets = folder / "llama2-7b", ["q_proj", "v_proj"]
    save_with_peft(
        base, folder / "dora", LoraConfig(r=4, use_dora=True, target_modules=targets, init_lora_weights=False)
    )
    scaled = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    save_with_peft(base, folder / "ia3", IA3Config(**scaled, init_ia3_weights=False))


def vision_and_text_folders(folder: Path) -> None:
    """Files of the authors' vision and GLUE code, a classifier of PEFT, pictures."""
    vit = VISION / "vanilla_qv"
    shutil.copytree(vit / "base", folder / "vit-base", dirs_exist_ok=True)
    shutil.copy(vit / "theta.bin", folder / "flowers.bin")
    shutil.copy(vit / "full_state_dict.bin", folder / "cars.bin")
    (folder / "food").mkdir()
    shutil.copy(vit / "full_state_dict.bin", folder / "food" / "pytorch_model.bin")
    shutil.copy(vit / "base" / "config.json", folder / "food")
    shutil.copytree(GLUE / "peanut_l_scale0.1" / "base", folder / "roberta-base")
    shutil.copy(GLUE / "peanut_l_scale0.1" / "theta.safetensors", folder / "mrpc.safetensors")
    theta = load_file(folder / "mrpc.safetensors")
    torch.save(theta, folder / "mrpc.bin")
    (folder / "red").mkdir()
    module = "encoder.layer.0.output.dense.delta_vector"
    width = json.loads((folder / "roberta-base" / "config.json").read_text())["hidden_size"]
    vectors = {f"{module}.activation_{part}": torch.rand(1, width) for part in ("scaling", "bias")}
    torch.save(vectors, folder / "red" / "delta_vector.pth")
    model = ViTForImageClassification.from_pretrained(folder / "vit-base", num_labels=5)
    save_adapter(model, folder / "pets", modules_to_save=["classifier"])
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "vit-base" / "preprocessor_config.json").write_text(json.dumps(processor))
    for label in ("beagle", "pug"):
        (folder / "pets-test" / label).mkdir(parents=True)
        Image.effect_noise((20, 24), 90).save(folder / "pets-test" / label / "1.png")
    shutil.copy(folder / "pets-test" / "beagle" / "1.png", folder / "beagle.png")
    (folder / "labels.json").write_text('["abyssinian", "beagle", "sphynx", "siamese", "pug"]')
