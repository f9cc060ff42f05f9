"""What the benchmark of classifiers serves: a ViT and a MiniLM with random adapters, merged and as ONNX."""

import io
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from onnx_inputs import CASES, ROOT, make_base
from peft import PeanutConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from converters import merge
from converters.api.exporting import export_onnx
from converters.outputs.onnx.plan import ExportOptions, Form

WORK = ROOT / "build" / "bench" / "classify"
DISTINCT = 10  # adapters; further tasks are copies under other names
TEXT = "a film that is as funny as it is sad , with a plot nobody saw coming and an end nobody wanted"


@dataclass(frozen=True)
class Served:
    """A base with tasks.

    Attributes:
        name: of the case.
        base: its folder.
        kind: `image` or `text`.
    """

    name: str
    base: Path
    kind: str

    @property
    def merged(self) -> Path:
        """The first task as a checkpoint."""
        return WORK / self.name / "merged"

    @property
    def onnx(self) -> Path:
        """The first task as a graph."""
        return WORK / self.name / "task"

    def many(self, tasks: int) -> Path:
        """So many tasks of one swappable graph."""
        return WORK / self.name / f"tasks-{tasks}"

    @property
    def content_type(self) -> str:
        """Of a request."""
        return "image/png" if self.kind == "image" else "application/json"

    def bodies(self) -> list[bytes]:
        """Requests: images of 320 x 240, or texts of 5 to 60 words."""
        rng, draw = np.random.default_rng(0), random.Random(0)
        if self.kind == "image":
            return [_png(rng.integers(0, 256, (240, 320, 3), np.uint8)) for _ in range(16)]
        texts = [" ".join(draw.choices(TEXT.split(), k=draw.randint(5, 60))) for _ in range(64)]
        return [json.dumps({"inputs": text}).encode() for text in texts]


REAL = (Served("vit-base", CASES["vit-base"].base, "image"), Served("minilm", ROOT / "build/bases/minilm", "text"))
SHORT = (Served("vit-small", ROOT / "build/bases/vit-small", "image"), REAL[1])


def _png(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make(case: Served, counts: tuple[int, ...]) -> None:
    """Make what is not there: the merged task as a checkpoint and as a graph, and swappable graphs."""
    if not case.base.exists():
        make_base(case.base)
    adapters = [_adapter(case, number) for number in range(DISTINCT)]
    labels = [f"label-{i}" for i in range(10)]
    if not case.merged.exists():
        merge(case.base, adapters[0], case.merged, labels=labels)
    if not case.onnx.exists():
        export_onnx(case.base, adapters[0], case.onnx, labels=labels, options=ExportOptions(verify=False))
    for count in counts:
        if not case.many(count).exists():
            options = ExportOptions(form=Form.SWAPPABLE, verify=False)
            export_onnx(case.base, _named(case, adapters, count), case.many(count), each=True, options=options)


def _named(case: Served, adapters: list[Path], count: int) -> list[Path]:
    found = []
    for number in range(count):
        folder = WORK / case.name / "named" / f"task-{number:03}"
        if not folder.exists():
            shutil.copytree(adapters[number % len(adapters)], folder)
        found.append(folder)
    return found


def _adapter(case: Served, number: int) -> Path:
    folder = WORK / case.name / "adapters" / str(number)
    if not folder.exists():
        torch.manual_seed(number)
        auto = AutoModelForImageClassification if case.kind == "image" else AutoModelForSequenceClassification
        model = auto.from_pretrained(case.base, num_labels=10, ignore_mismatched_sizes=True)
        names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        targets = ["q_proj", "v_proj"] if "q_proj" in names else ["query", "value"]
        settings = PeanutConfig(r=8, target_modules=targets, modules_to_save=["classifier"], init_weights=False)
        get_peft_model(model, settings).save_pretrained(str(folder))
        (folder / "labels.json").write_text(json.dumps([f"label-{i}" for i in range(10)]))
    return folder
