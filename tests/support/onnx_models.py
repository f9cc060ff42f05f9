"""Graphs of tiny models with adapters, and what to feed them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from support.paths import DATA
from support.tiny_models import save_adapter

from converters.api.exporting import export_onnx
from converters.inference.session import Session
from converters.outputs.onnx.graphs.quantization import Quantized, quantize
from converters.outputs.onnx.plan import ExportOptions

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 96,
}
TEXTS = {
    "bert": (tf.BertForSequenceClassification, tf.BertConfig(**SIZES, num_labels=3), ["query", "value"]),
    "roberta": (
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig(**SIZES, num_labels=3, max_position_embeddings=48),
        ["query", "value"],
    ),
    "llama": (
        tf.LlamaForCausalLM,
        tf.LlamaConfig(**SIZES, tie_word_embeddings=True, max_position_embeddings=4096),
        ["q_proj", "v_proj"],
    ),
}
IMAGES = ("digits5to9", "oddeven")
MODELS = (*IMAGES, *TEXTS)
LABELS = ["bad", "fair", "good"]
PRECISIONS = ("int8", "fp16")


@dataclass(frozen=True)
class Graphs:
    """A graph and what was made of it, by precision, `fp32` among them."""

    paths: dict[str, Path]
    facts: dict[str, Quantized]

    def run(self, precision: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        return Session(self.paths[precision]).run(inputs)


def make_text_model(name: str, folder: Path) -> tuple[Path, Path]:
    """A base and an adapter, with weights of such a size that every layer matters."""
    model_class, config, targets = TEXTS[name]
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder / "base")
    heads = None if name == "llama" else ["classifier"]
    save_adapter(model, folder / "adapter", target_modules=targets, modules_to_save=heads, scaling=0.1)
    return folder / "base", folder / "adapter"


def export_graph(base: Path, adapter: Path, folder: Path, labels: list[str] | None = None) -> Path:
    """The merged graph in float32, not held against torch; other tests do that."""
    export_onnx(base, adapter, folder, labels=labels, options=ExportOptions(verify=False))
    return folder / "model.onnx"


def quantized_graphs(name: str, folder: Path) -> Graphs:
    """One of `MODELS` in every precision."""
    vit = DATA / "vit-tiny"
    pair = (vit / "base", vit / name) if name in IMAGES else make_text_model(name, folder)
    model = export_graph(*pair, folder / "onnx", LABELS if name in ("bert", "roberta") else None)
    paths = {precision: folder / f"{precision}.onnx" for precision in PRECISIONS}
    facts = {precision: quantize(model, path, precision) for precision, path in paths.items()}
    return Graphs({"fp32": model, **paths}, facts)


def texts(name: str, batch: int, length: int, pad_left: bool = False) -> dict[str, np.ndarray]:
    """Inputs for `TEXTS[name]`: all texts but the first are padded."""
    rng = np.random.default_rng(batch * length)
    ids = rng.integers(3, SIZES["vocab_size"], (batch, length))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        absent = rng.integers(1, length)
        mask[row, slice(0, absent) if pad_left else slice(length - absent, length)] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    return {**made, "token_type_ids": (ids > 50).astype(np.int64)} if name == "bert" else made


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of all numbers in two arrays."""
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
