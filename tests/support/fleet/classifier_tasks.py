"""Exports of tiny classifiers for a fleet: tasks that differ in what they answer, not in what they are called."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.companions.preprocessor_folders import text_model
from support.onnx_models import LABELS, SIZES, export_graph
from support.paths import DATA
from support.tiny_models import save_adapter
from transformers import BertConfig, BertForSequenceClassification

from converters.api.exporting import export_onnx
from converters.outputs.onnx.plan import ExportOptions, Form

TASKS = ("first", "second", "third", "fourth")  # of images


def image_tasks(folder: Path) -> Path:
    """Tasks with the same labels and other weights in one swappable graph."""
    for name, factor in zip(TASKS, (1.0, -1.0, 0.5, -2.0), strict=True):
        source, made = DATA / "vit-tiny" / "oddeven", folder / name
        made.mkdir()
        (made / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
        (made / "labels.json").write_text(json.dumps(["even", "odd"]))
        tensors = load_file(source / "adapter_model.safetensors")
        save_file({key: value * factor for key, value in tensors.items()}, made / "adapter_model.safetensors")
    options = ExportOptions(form=Form.SWAPPABLE, verify=False)
    adapters = [folder / name for name in TASKS]
    export_onnx(DATA / "vit-tiny" / "base", adapters, folder / "out", each=True, options=options)
    return folder / "out"


def text_task(folder: Path) -> Path:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
    model.save_pretrained(folder / "base")
    text_model(folder / "base")
    save_adapter(model, folder / "adapter", target_modules=["query"], modules_to_save=["classifier"])
    return export_graph(folder / "base", folder / "adapter", folder / "sentiment", LABELS).parent
