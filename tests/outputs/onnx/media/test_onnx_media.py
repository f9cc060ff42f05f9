"""Models of images and of sounds as ONNX, against PEFT's unmerged forward pass of the adapter as it was saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from support.companions.preprocessor_folders import picture, save_picture
from support.media.onnx_media import MEDIA_ROWS, MediaRow
from support.media.sound_files import save_sound, sound
from transformers import PreTrainedModel

from converters.api.exporting import export_onnx
from converters.inference.session import LoadedAdapter, Session
from converters.inference.sounds import read_sound
from converters.outputs.onnx.options import ExportOptions, Form
from peanut_serve.classify.engine import OnnxEngine

pytestmark = pytest.mark.slow  # a trace for each


def lively(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    """Make weights of such a size that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def save_base(row: MediaRow, folder: Path) -> None:
    torch.manual_seed(0)
    model = row.model_class(row.config())
    lively(dict(model.named_parameters()), 0)
    model.save_pretrained(folder)
    if row.processor:
        row.processor().save_pretrained(folder)


def load_base(row: MediaRow, folder: Path, labels: int) -> PreTrainedModel:
    config = row.config().from_pretrained(folder, num_labels=labels)
    torch.manual_seed(labels)
    return row.model_class.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)


def train(row: MediaRow, base: Path, labels: int, folder: Path) -> PeftModel:
    """Save an adapter, and load it again as people do."""
    weights = {"init_lora_weights" if row.adapter.__name__ == "LoraConfig" else "init_weights": False}
    settings = {"r": 4, "target_modules": row.targets, "modules_to_save": row.heads, **weights}
    adapted = get_peft_model(load_base(row, base, labels), row.adapter(**settings))
    lively({name: one for name, one in adapted.named_parameters() if "modules_to_save" in name}, labels)
    adapted.save_pretrained(folder)
    return PeftModel.from_pretrained(load_base(row, base, labels), folder).eval()


def wanted(row: MediaRow, model: PeftModel, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.inference_mode():
        if isinstance(row.output, str):
            return model(**inputs)[row.output].numpy()
        return row.output(model.base_model.model, *inputs.values()).numpy()


def example_files(row: MediaRow, folder: Path) -> list[Path]:
    if row.input == "pixel_values":
        return [save_picture(folder / f"{width}.png", picture(width, 40)) for width in (40, 63)]
    return [save_sound(folder / f"{count}.wav", sound(count, count)) for count in (900, 1503)]


def check_predictions(row: MediaRow, folder: Path, task: str, model: PeftModel) -> None:
    """What `peanut-serve predict` says of files, against transformers' processor before the model in torch."""
    files = example_files(row, folder / "files")
    for file, found in zip(files, OnnxEngine(folder).predict(files, task), strict=True):
        if row.input == "pixel_values":
            inputs = row.processor()(Image.open(file), return_tensors="pt")
        else:
            inputs = row.processor()(read_sound(file)[0], sampling_rate=16000, return_tensors="pt")
        with torch.inference_mode():
            scores = model(**inputs).logits[0].softmax(0)
        assert [one.label for one in found] == [f"LABEL_{index}" for index in scores.argsort(descending=True)]
        np.testing.assert_allclose([one.score for one in found], scores.sort(descending=True).values, rtol=1e-4)


@pytest.mark.parametrize("name", MEDIA_ROWS)
def test_every_model_in_every_form(name: str, tmp_path: Path) -> None:
    row = MEDIA_ROWS[name]
    base = tmp_path / "base"
    save_base(row, base)
    counts = (5, 2) if row.heads else (3,)
    tasks = {f"task{n}": train(row, base, n, tmp_path / f"task{n}") for n in counts}
    folders = [tmp_path / task for task in tasks]
    for form in row.forms:
        export_onnx(base, folders, tmp_path / form.value, each=True, options=ExportOptions(form=form))
    for task, model in tasks.items():
        if row.processor:
            check_predictions(row, tmp_path / Form.SHARED.value, task, model)
        runs = {form: (Session(tmp_path / form.value / f"{task}.onnx"), None) for form in row.forms
                if form is not Form.SWAPPABLE}  # fmt: skip
        if Form.SWAPPABLE in row.forms:
            folder = tmp_path / "swappable"
            runs[Form.SWAPPABLE] = (Session(folder / "model.onnx"), LoadedAdapter(folder / f"{task}.onnx_adapter"))
        for turn, batch in enumerate((1, 3)):
            inputs = row.inputs(batch, turn)
            expected = wanted(row, model, inputs)
            assert np.abs(expected).max() > 0.01  # else nothing is compared
            for form, (session, adapter) in runs.items():
                found = session.run({key: value.numpy() for key, value in inputs.items()}, adapter)
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5, err_msg=form.value)
