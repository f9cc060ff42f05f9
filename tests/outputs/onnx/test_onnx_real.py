"""Real pretrained encoders with really trained adapters, on real data: ONNX says what torch says."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from sklearn.datasets import load_digits
from support.commands import Run
from support.paths import ROOT
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, ViTForImageClassification

from converters.inference.session import LoadedAdapter, Session

EXAMPLES = ROOT / "examples" / "onnx"
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, np.ndarray]:
    """Held-out digits as the adapter's training saw them, float32 (n, 3, 56, 56), and which they are."""
    found = load_digits()
    images = torch.tensor(found.images[1600:] / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    images = torch.nn.functional.interpolate(images, size=56, mode="bilinear", align_corners=False)
    return (images - MEAN) / STD, found.target[1600:]


def test_digits_by_vit_small(
    vit_small: Path, digits: tuple[torch.Tensor, np.ndarray], tmp_path: Path, run_here: Run
) -> None:
    adapter = EXAMPLES / "vit-small-digits"
    common = ("--base", vit_small, "--adapter", adapter, "--format", "onnx", "--json")
    done = run_here("peanut-merge", *common, "-o", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert run_here("peanut-merge", *common, "--swappable", "-o", tmp_path / "swappable").returncode == 0
    config = AutoConfig.from_pretrained(vit_small, num_labels=10)
    model = ViTForImageClassification.from_pretrained(vit_small, config=config)
    pixels, digit = digits
    with torch.inference_mode():
        wanted = PeftModel.from_pretrained(model, adapter).eval()(pixel_values=pixels).logits.numpy()
    inputs = {"pixel_values": pixels.numpy()}
    loaded = LoadedAdapter(tmp_path / "swappable" / "vit-small-digits.onnx_adapter")
    for found in (
        Session(tmp_path / "merged" / "model.onnx").run(inputs),
        Session(tmp_path / "swappable" / "model.onnx").run(inputs, loaded),
    ):
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
        assert (found.argmax(1) == wanted.argmax(1)).all()
        assert (found.argmax(1) == digit).mean() > 0.95


def test_sentiment_by_minilm(minilm: Path, tmp_path: Path, run_here: Run) -> None:
    """By way of `--eval-data`, and once more with PEFT and transformers' tokenizer alone."""
    adapter, snippets = EXAMPLES / "minilm-sentiment", tmp_path / "snippets.csv"
    lines = (EXAMPLES / "movie_snippets.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    snippets.write_text("".join([lines[0], *lines[1::3]]), encoding="utf-8")
    command = ("--base", minilm, "--adapter", adapter, "--format", "onnx", "--quantize", "int8", "--json")
    done = run_here("peanut-merge", *command, "--eval-data", snippets, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)["tasks"][0]["evaluation"]
    assert scores["fp32"]["accuracy"] == scores["torch"]["accuracy"] > 0.75
    assert scores["fp32"]["agreement"] == 1
    assert scores["int8"]["accuracy"] > scores["fp32"]["accuracy"] - 0.03
    with snippets.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    base = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
    model = PeftModel.from_pretrained(base, adapter).eval()
    inputs = tokenizer([row["text"] for row in rows[:64]], padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        wanted = model(**inputs).logits.numpy()
    found = Session(tmp_path / "out" / "model.onnx").run({name: value.numpy() for name, value in inputs.items()})
    assert (found.argmax(1) == wanted.argmax(1)).all()
    labels = json.loads((adapter / "labels.json").read_text())
    right = [labels[index] == row["label"] for index, row in zip(wanted.argmax(1), rows, strict=False)]
    assert len(rows) == scores["torch"]["count"]
    assert np.mean(right) > 0.7
