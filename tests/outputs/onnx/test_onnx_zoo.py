"""Architectures as ONNX: graphs in ONNX Runtime against PEFT's own unmerged forward pass, in float32."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeanutConfig, get_peft_model

from converters.api.exporting import export_onnx
from converters.inference.session import LoadedAdapter, Session
from converters.outputs.onnx.plan import ExportOptions, Form

pytestmark = pytest.mark.slow  # a trace for each

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}
DINO = {name: size for name, size in VISION.items() if name != "intermediate_size"}
TEXT = {**SIZES, "vocab_size": 96, "max_position_embeddings": 40}
LM = {**TEXT, "num_key_value_heads": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
DISTIL = {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "vocab_size": 96, "max_position_embeddings": 40}
QV, QUERY_VALUE = ["q_proj", "v_proj"], ["query", "value"]
HEAD = ["classifier"]


@dataclass(frozen=True)
class Animal:
    """A tiny model, the modules that are adapted, and those that are trained whole."""

    model_class: type[tf.PreTrainedModel]
    config: Callable[[], tf.PretrainedConfig]
    targets: list[str]
    heads: list[str] | None
    output: str = "logits"
    adapter: Callable[..., Any] = PeanutConfig


ZOO = {
    "vit": Animal(tf.ViTForImageClassification, lambda: tf.ViTConfig(**VISION), QV, HEAD),
    "vit-features": Animal(tf.ViTModel, lambda: tf.ViTConfig(**VISION), QV, None, "last_hidden_state"),
    "deit": Animal(tf.DeiTForImageClassification, lambda: tf.DeiTConfig(**VISION), QV, HEAD),
    "deit-teacher": Animal(
        tf.DeiTForImageClassificationWithTeacher,
        lambda: tf.DeiTConfig(**VISION),
        QV,
        ["cls_classifier", "distillation_classifier"],
    ),
    "dinov2": Animal(tf.Dinov2ForImageClassification, lambda: tf.Dinov2Config(**DINO), [*QV, "fc1"], HEAD),
    "dinov2-registers": Animal(
        tf.Dinov2WithRegistersForImageClassification, lambda: tf.Dinov2WithRegistersConfig(**DINO), QV, HEAD
    ),
    "swin": Animal(tf.SwinForImageClassification, lambda: tf.SwinConfig(**SWIN), QV, HEAD),
    "beit": Animal(
        tf.BeitForImageClassification, lambda: tf.BeitConfig(**VISION, use_relative_position_bias=True), QV, HEAD
    ),
    "bert": Animal(tf.BertForSequenceClassification, lambda: tf.BertConfig(**TEXT), QUERY_VALUE, HEAD),
    "bert-tokens": Animal(tf.BertForTokenClassification, lambda: tf.BertConfig(**TEXT), QUERY_VALUE, HEAD),
    "bert-features": Animal(tf.BertModel, lambda: tf.BertConfig(**TEXT), QUERY_VALUE, None, "last_hidden_state"),
    "roberta": Animal(tf.RobertaForSequenceClassification, lambda: tf.RobertaConfig(**TEXT), QUERY_VALUE, HEAD),
    "xlm-roberta": Animal(
        tf.XLMRobertaForTokenClassification, lambda: tf.XLMRobertaConfig(**TEXT), QUERY_VALUE, HEAD
    ),
    "camembert": Animal(tf.CamembertForSequenceClassification, lambda: tf.CamembertConfig(**TEXT), QUERY_VALUE, HEAD),
    "electra": Animal(
        tf.ElectraForSequenceClassification, lambda: tf.ElectraConfig(**TEXT, embedding_size=16), QUERY_VALUE, HEAD
    ),
    "distilbert": Animal(
        tf.DistilBertForSequenceClassification,
        lambda: tf.DistilBertConfig(**DISTIL),
        ["q_lin", "v_lin"],
        ["pre_classifier", "classifier"],
    ),
    "llama": Animal(tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**LM, tie_word_embeddings=True), QV, None),
    "qwen2": Animal(tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**LM), QV, None),
    "gpt2": Animal(
        tf.GPT2LMHeadModel,
        lambda: tf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96, n_positions=40),
        ["c_attn", "c_fc"],
        None,
        adapter=lambda **settings: LoraConfig(r=settings["r"], target_modules=settings["target_modules"],
                                              init_lora_weights=False, fan_in_fan_out=True),
    ),
}  # fmt: skip


def lively(parameters: Iterable[torch.nn.Parameter], seed: int = 0) -> None:
    """Make weights of such a size that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def inputs_of(model: tf.PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(batch, 3, *[model.config.image_size] * 2, generator=generator)}
    ids = torch.randint(3, 96, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids % 2) * (ids > 50)}


class Trained:
    """An adapter as PEFT has it in memory, and the same on disk."""

    def __init__(self, animal: Animal, base: Path, labels: int, folder: Path) -> None:
        config = animal.config().from_pretrained(base, num_labels=labels)
        torch.manual_seed(labels)
        model = animal.model_class.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
        settings = {"r": 4, "target_modules": animal.targets, "modules_to_save": animal.heads, "scaling": 0.7}
        self.model = get_peft_model(model, animal.adapter(**settings, init_weights=False)).eval()
        lively([p for name, p in self.model.named_parameters() if "modules_to_save" in name], labels)
        self.model.save_pretrained(folder, save_embedding_layers=False)
        self.folder = folder
        self._animal = animal

    def __call__(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        known = {name: value for name, value in inputs.items() if name != "token_type_ids" or self._takes_types()}
        with torch.inference_mode():
            return self.model(**known)[self._animal.output].numpy()

    def _takes_types(self) -> bool:
        return self.model.config.model_type in ("bert", "electra")


def compare(session: Session, adapter: LoadedAdapter | None, trained: Trained) -> None:
    for batch, length in ((1, 3), (3, 11)):
        inputs = inputs_of(trained.model, batch, length)
        wanted = trained(inputs)
        found = session.run({name: value.numpy() for name, value in inputs.items()}, adapter)
        assert found.shape == wanted.shape
        assert np.abs(wanted).max() > 0.01  # else nothing is compared
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    animal = ZOO[name]
    torch.manual_seed(0)
    base = animal.model_class(animal.config())
    lively(base.parameters())
    base.save_pretrained(tmp_path / "base")
    counts = (5, 1) if animal.heads else (3,)
    tasks = {f"task{n}": Trained(animal, tmp_path / "base", n, tmp_path / f"task{n}") for n in counts}
    folders = [trained.folder for trained in tasks.values()]
    forms = [Form.SHARED, Form.SWAPPABLE]
    if name == "gpt2":
        forms.append(Form.SELF_MERGING)  # f of weights that are stored transposed
    for form in forms:
        export_onnx(tmp_path / "base", folders, tmp_path / form.value, each=True, options=ExportOptions(form=form))
    swappable = Session(tmp_path / "swappable" / "model.onnx")
    for task, trained in tasks.items():
        compare(Session(tmp_path / "shared" / f"{task}.onnx"), None, trained)
        if Form.SELF_MERGING in forms:
            compare(Session(tmp_path / "self-merging" / f"{task}.onnx"), None, trained)
        compare(swappable, LoadedAdapter(tmp_path / "swappable" / f"{task}.onnx_adapter"), trained)
