"""One row: adapters of PEFT on a tiny model, exported in every form, compared with PEFT's unmerged forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from support.companions.preprocessor_folders import picture, save_picture
from support.media.sound_files import save_sound, sound
from support.onnx_zoo.image_rows import IMAGE_ROWS
from support.onnx_zoo.rows import Row
from support.onnx_zoo.sentence_rows import SENTENCE_ROWS
from support.onnx_zoo.sound_rows import SOUND_ROWS
from support.onnx_zoo.text_rows import TEXT_ROWS
from support.onnx_zoo.trained import SHAPES, Trained, save_base

from converters.api.exporting import export_onnx
from converters.inference.session import LoadedAdapter, Session
from converters.inference.sounds import read_sound
from converters.outputs.onnx.options import ExportOptions, Form
from peanut_serve.classify.engine import OnnxEngine

ROWS: dict[str, Row] = {**IMAGE_ROWS, **SOUND_ROWS, **TEXT_ROWS, **SENTENCE_ROWS}
TOLERANCE = 1e-4  # relative to the largest output


@dataclass(frozen=True)
class Found:
    """The largest relative differences of any task of a row from PEFT.

    Attributes:
        forms: by form, of the outputs.
        files: of the scores that the engine gives files, from those of transformers' processor and PEFT; None if the
            row has no processor.
    """

    forms: dict[str, float]
    files: float | None

    @property
    def largest(self) -> float:
        return max([*self.forms.values(), self.files or 0.0])


def difference(session: Session, adapter: LoadedAdapter | None, trained: Trained) -> float:
    """The largest difference from PEFT, relative to its largest output; padding is not compared."""
    largest = 0.0
    for turn in range(len(SHAPES)):
        inputs = trained.batch(turn)
        found = session.run_all({name: value.numpy() for name, value in inputs.items()}, adapter)
        for ours, theirs in zip(found, trained(inputs), strict=True):
            assert ours.shape == theirs.shape
            real = np.ones(theirs.shape[:1], bool)
            if "attention_mask" in inputs and theirs.shape[:2] == inputs["attention_mask"].shape:
                real = inputs["attention_mask"].numpy() == 1
            scale = float(np.abs(theirs[real]).max())
            assert scale > 0.01  # else nothing is compared
            largest = max(largest, float(np.abs(ours[real] - theirs[real]).max()) / scale)
    return largest


def difference_of_files(output: Path, task: str, trained: Trained, folder: Path) -> float:
    """What `peanut-serve predict` says of images or sounds, compared with transformers' processor before PEFT."""
    processor = trained.row.processor()
    if trained.inputs == ("pixel_values",):
        files = [save_picture(folder / f"{width}.png", picture(width, 40)) for width in (40, 63)]
        batches = [processor(Image.open(file), return_tensors="pt") for file in files]
    else:
        files = [save_sound(folder / f"{count}.wav", sound(count, count)) for count in (900, 1503)]
        batches = [processor(read_sound(file)[0], sampling_rate=16000, return_tensors="pt") for file in files]
    largest = 0.0
    for inputs, found in zip(batches, OnnxEngine(output).predict(files, task), strict=True):
        with torch.inference_mode():
            scores = trained.model(**inputs).logits[0].softmax(0)
        wanted = {f"LABEL_{index}": float(score) for index, score in enumerate(scores)}
        assert wanted.keys() == {one.label for one in found}
        largest = max(largest, *(abs(one.score - wanted[one.label]) for one in found))
    return largest


def run_row(row: Row, folder: Path, forms: Sequence[Form]) -> Found:
    """Export a row and compare it."""
    save_base(row, folder / "base")
    tasks = {f"task{n}": Trained(row, folder / "base", n, folder / f"task{n}") for n in row.labels}
    differences = {}
    for form in forms:
        output = folder / form.value
        single = form is Form.MERGED and len(tasks) == 1
        folders = [trained.folder for trained in tasks.values()]
        export_onnx(folder / "base", folders, output, each=not single, options=ExportOptions(form=form))
        found = []
        for name, trained in tasks.items():
            adapter = LoadedAdapter(output / f"{name}.onnx_adapter") if form is Form.SWAPPABLE else None
            found.append(difference(Session(_graph(output, name, form, single)), adapter, trained))
        differences[form.value] = max(found)
    if not row.processor:
        return Found(differences, None)
    name = f"task{row.labels[0]}"
    shared = folder / Form.SHARED.value
    return Found(differences, difference_of_files(shared, name, tasks[name], folder / "files"))


def _graph(output: Path, task: str, form: Form, single: bool) -> Path:
    if form is Form.MERGED:
        return output / "model.onnx" if single else output / task / "model.onnx"
    return output / ("model.onnx" if form is Form.SWAPPABLE else f"{task}.onnx")
