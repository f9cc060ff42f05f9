"""Exports of tiny models in every form, for servers of classifiers."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.companions.preprocessor_folders import WORDS, text_model
from support.companions.sentence_folders import pooling_modes, write_modules
from support.onnx_zoo.sound_rows import PROJECTED, QV, WAVES
from support.paths import DATA
from support.tiny_models import save_adapter
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from converters.api.exporting import export_onnx
from converters.outputs.onnx.plan import ExportOptions, Form

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
BERT = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 24}
# labels betray their task
TASKS = ("angry", "happy", "sober", "tired")
LABELS = {task: [f"{task}-{i}" for i in range(3)] for task in TASKS}
TEXTS = ("good film", "bad", "good good bad film bad film", "film film bad good bad bad good film good")


def model(kind: type[PreTrainedModel], labels: int = 3) -> PreTrainedModel:
    """With weights of such a size that every layer matters."""
    torch.manual_seed(0)
    settings = BERT if kind.config_class is BertConfig else WAVES
    made = kind(kind.config_class(**settings, num_labels=labels))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def export_one(folder: Path, kind: type[PreTrainedModel], labels: list[str] | None, **more: Any) -> Path:
    """One task in the form `merged`; `sentences` makes it a model of sentence-transformers."""
    work = folder.with_name(f".{folder.name}")
    made = model(kind, len(labels or "ab"))
    made.save_pretrained(work / "base")
    text_model(work / "base")
    if more.pop("sentences", False):
        write_modules(work / "base", pooling_modes(("mean_tokens",)), max_length=20)
    heads = {"modules_to_save": ["classifier"]} if labels else {}
    save_adapter(made, work / "adapter", target_modules=["query", "value"], **heads)
    export_onnx(work / "base", work / "adapter", folder, labels=labels, options=ExportOptions(verify=False, **more))
    return folder


def export_tasks(root: Path, forms: Sequence[Form], tasks: Sequence[str] = TASKS) -> list[Path]:
    """Classifiers of texts on one base, in these forms; every task has weights of its own."""
    model(BertForSequenceClassification).save_pretrained(root / ".base")
    text_model(root / ".base")
    adapters = []
    for number, task in enumerate(tasks):
        folder = root / ".adapters" / task
        made = model(BertForSequenceClassification)  # PEFT changes it
        save_adapter(made, folder, target_modules=["query", "value"], modules_to_save=["classifier"], seed=number)
        (folder / "labels.json").write_text(json.dumps(LABELS[task]))
        adapters.append(folder)
    for form in forms:
        options = ExportOptions(form=form, verify=False)
        export_onnx(root / ".base", adapters, root / form.value, each=True, options=options)
    return [root / form.value for form in forms]


def export_digits(root: Path) -> Path:
    """An image classifier, `digits`."""
    adapter = shutil.copytree(DATA / "vit-tiny" / "digits5to9", root / ".digits")
    (adapter / "labels.json").write_text(json.dumps(["5", "6", "7", "8", "9"]))
    export_onnx(DATA / "vit-tiny" / "base", adapter, root / "digits", options=ExportOptions(verify=False))
    return root / "digits"


def export_questions(root: Path) -> Path:
    """A model that answers questions, `squad`."""
    made = model(BertForQuestionAnswering, 2)  # the logits of a first and of a last token
    made.save_pretrained(root / ".squad" / "base")
    text_model(root / ".squad" / "base")
    heads = {"target_modules": ["query", "value"], "modules_to_save": ["qa_outputs"]}
    save_adapter(made, root / ".squad" / "adapter", **heads)
    folders = (root / ".squad" / "base", root / ".squad" / "adapter", root / "squad")
    export_onnx(*folders, options=ExportOptions(verify=False))
    return root / "squad"


def export_sounds(root: Path) -> Path:
    """A classifier of sounds of any length, `sounds`."""
    made = model(Wav2Vec2ForSequenceClassification)
    made.save_pretrained(root / ".sounds" / "base")
    Wav2Vec2FeatureExtractor().save_pretrained(root / ".sounds" / "base")
    save_adapter(made, root / ".sounds" / "adapter", target_modules=QV, modules_to_save=PROJECTED)
    folders = (root / ".sounds" / "base", root / ".sounds" / "adapter", root / "sounds")
    export_onnx(*folders, labels=["hum", "click", "hiss"], options=ExportOptions(verify=False))
    return root / "sounds"


def export_all(root: Path) -> Path:
    """A folder of exports: `swappable`, `mood` (in every precision), and one of each other kind of task."""
    export_tasks(root, [Form.SWAPPABLE])
    export_one(root / "mood", BertForSequenceClassification, ["bad", "fair", "good"], quantize=("int8", "fp16"))
    export_one(root / "names", BertForTokenClassification, ["O", "B-X", "I-X"])
    export_one(root / "sentences", BertModel, None, sentences=True)
    export_one(root / "features", BertModel, None)
    export_digits(root)
    export_questions(root)
    export_sounds(root)
    return root
