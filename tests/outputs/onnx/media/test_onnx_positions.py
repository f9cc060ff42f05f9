"""Images of another size than the config's: refused, or with interpolated positions as in transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeanutConfig, PeftModel, get_peft_model
from PIL import Image
from support.commands import Run
from support.companions.preprocessor_folders import picture, save_picture
from support.onnx_zoo.image_rows import BEIT, DINO, SWIN, TOWERS, VISION, whole
from support.onnx_zoo.rows import HEAD, QV
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipImageProcessorPil,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from converters.api.exporting import export_onnx
from converters.errors import ConversionError, OptionError
from converters.outputs.onnx.options import ExportOptions
from peanut_serve.classify.engine import OnnxEngine

MODELS = {
    "vit": (ViTForImageClassification, lambda: ViTConfig(**VISION)),
    "siglip": (SiglipForImageClassification, lambda: SiglipConfig(**TOWERS)),
    "clip": (CLIPForImageClassification, lambda: CLIPConfig(**TOWERS)),
    "deit": (DeiTForImageClassification, lambda: DeiTConfig(**VISION)),
    "beit": (BeitForImageClassification, lambda: BeitConfig(**BEIT, use_absolute_position_embeddings=True)),
    "swin": (
        SwinForImageClassification,
        lambda: SwinConfig(**{**SWIN, "window_size": 3}, use_absolute_embeddings=True),  # no wider than its stages
    ),
    "dinov2": (Dinov2ForImageClassification, lambda: Dinov2Config(**DINO)),
}
PROCESSOR = SiglipImageProcessorPil(**whole(24))  # the models' own size is 16, that of Swin 32


def save_pair(name: str, folder: Path) -> PeftModel:
    model_class, config = MODELS[name]
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder / "base")
    PROCESSOR.save_pretrained(folder / "base")
    settings = {"r": 4, "target_modules": QV, "modules_to_save": HEAD, "init_weights": False}
    adapted = get_peft_model(model, PeanutConfig(**settings)).eval()
    adapted.save_pretrained(folder / "adapter")
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "siglip", "clip", "deit", "beit", "swin"])
def test_interpolated_positions(name: str, tmp_path: Path, run_here: Run) -> None:
    model = save_pair(name, tmp_path)
    command = ("peanut-merge", "--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--format", "onnx")
    done = run_here(*command, "--interpolate-pos-encoding", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    file = save_picture(tmp_path / "a.png", picture(31, 40))
    inputs = PROCESSOR(Image.open(file), return_tensors="pt")
    with torch.inference_mode():
        wanted = model(**inputs, interpolate_pos_encoding=True).logits.numpy()
    engine = OnnxEngine(tmp_path / "out")
    found = engine.run({"pixel_values": inputs["pixel_values"].numpy()})
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert engine.predict([file])[0][0].label == f"LABEL_{wanted.argmax()}"


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_another_size_without_the_option(name: str, tmp_path: Path) -> None:
    save_pair(name, tmp_path)
    with pytest.raises(ConversionError, match=r"images of 24 x 24 .* positions for 16 x 16; use interpolate_pos"):
        export_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_the_option(tmp_path: Path) -> None:
    save_pair("dinov2", tmp_path)
    options = ExportOptions(interpolate_pos_encoding=True)
    with pytest.raises(OptionError, match=r"is for vit, deit, .*, but this model is a dinov2, for which .* leave it"):
        export_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", options=options)
