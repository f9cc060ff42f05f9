"""A classifier of sounds through the commands: measured on WAV files, and asked about them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.commands import Run
from support.media.sound_files import save_sound, sound
from support.onnx_zoo.running import ROWS
from support.onnx_zoo.trained import Trained, save_base

from converters.inference.sounds import read_sound


@pytest.mark.slow
def test_sounds_through_the_commands(tmp_path: Path, run_here: Run) -> None:
    row, base, out = ROWS["wav2vec2"], tmp_path / "base", tmp_path / "out"
    save_base(row, base)
    trained = Trained(row, base, 3, tmp_path / "adapter")
    files = [save_sound(tmp_path / "sounds" / f"{n}.wav", sound(700 + 90 * n, n)) for n in range(6)]
    scores = []
    for file in files:
        inputs = row.processor()(read_sound(file)[0], sampling_rate=16000, return_tensors="pt")
        with torch.inference_mode():
            scores.append(trained.model(**inputs).logits[0].softmax(0))
    for number, (file, score) in enumerate(zip(files, scores, strict=True)):  # every third label is wrong
        label = (int(score.argmax()) + (number % 3 == 0)) % 3
        (tmp_path / "data" / f"LABEL_{label}").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "data" / f"LABEL_{label}")
    command = ("peanut-merge", "--base", base, "--adapter", trained.folder, "--format", "onnx", "-o", out)
    done = run_here(*command, "--eval-data", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert "accuracy 66.67% of 6" in done.stdout + done.stderr, (done.stdout, done.stderr)
    done = run_here("peanut-serve", "predict", out, *files, "--json")
    assert done.returncode == 0, done.stderr
    for answer, file, score in zip(json.loads(done.stdout), files, scores, strict=True):
        assert answer["input"] == str(file)
        assert {one["label"]: one["score"] for one in answer["predictions"]} == pytest.approx(
            {f"LABEL_{index}": float(one) for index, one in enumerate(score)}, rel=1e-4
        )
