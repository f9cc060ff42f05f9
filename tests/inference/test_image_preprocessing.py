"""Preprocessing of images, compared with Pillow and numpy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.companions.preprocessor_folders import (
    IMAGES,
    MEAN,
    STD,
    TEXTS,
    VIT,
    image_model,
    normalised,
    picture,
    refusal,
    save_picture,
    text_model,
    texts_of,
    write,
)
from transformers import BitImageProcessorPil

from converters.errors import CheckpointError, MissingDependencyError, OptionError
from converters.inference.images import ImagePreprocessor, image_shape
from converters.inference.preprocessing import open_preprocessor


def test_images_are_resized_rescaled_and_normalised_in_order(tmp_path: Path):
    model = image_model(tmp_path / "model")
    images = [picture(11, 7, seed=1), picture(5, 30, seed=2)]
    files = [save_picture(tmp_path / f"{i}.png", image) for i, image in enumerate(images)]
    found = open_preprocessor(model, IMAGES, VIT)(files)
    wanted = [normalised(np.asarray(image.resize((8, 6), Image.Resampling.BILINEAR))) for image in images]
    assert list(found) == ["pixel_values"]
    assert found["pixel_values"].dtype == np.float32
    np.testing.assert_allclose(found["pixel_values"], np.array(wanted), rtol=0, atol=1e-5)


def test_images_are_cropped_to_the_centre_if_the_processor_says_so(tmp_path: Path):
    crop = {"crop_size": {"height": 6, "width": 4}, "image_mean": MEAN, "image_std": STD}
    BitImageProcessorPil(size={"shortest_edge": 8}, resample=3, **crop).save_pretrained(tmp_path)
    image = picture(16, 32)
    preprocess = ImagePreprocessor(tmp_path, VIT)
    found = preprocess([save_picture(tmp_path / "a.png", image)])["pixel_values"]
    resized = np.asarray(image.resize((8, 16), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(found, [normalised(resized[5:11, 2:6])], rtol=0, atol=1e-5)
    assert preprocess.shape == (3, 6, 4)


def test_without_rescaling_only_the_dtype_of_pixels_changes(tmp_path: Path):
    model = image_model(tmp_path / "model", do_rescale=False, do_normalize=False)
    found = ImagePreprocessor(model, VIT)([save_picture(tmp_path / "a.png", picture(8, 6))])["pixel_values"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], np.asarray(picture(8, 6)).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_are_converted_to_rgb(tmp_path: Path, mode: str):
    image = picture(8, 6).convert(mode)
    file = save_picture(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"), image)
    found = ImagePreprocessor(image_model(tmp_path / "model"), VIT)([file])["pixel_values"]
    np.testing.assert_allclose(found, [normalised(np.asarray(image.convert("RGB")))], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 6), (3, 3), (30, 1), (1, 30)])
def test_a_model_of_one_channel_gets_grey_images(tmp_path: Path, size: tuple[int, int], caplog):
    model = image_model(tmp_path / "model", image_mean=[0.5], image_std=[0.25])
    file = save_picture(tmp_path / "a.png", picture(*size))
    found = ImagePreprocessor(model, {**VIT, "num_channels": 1})([file])["pixel_values"]
    grey = np.asarray(picture(*size).convert("L").resize((8, 6), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(found, [[(grey / 255 - 0.5) / 0.25]], rtol=0, atol=1e-5)
    assert not caplog.records


@pytest.mark.parametrize("size", [(9, 3), (3, 3), (3, 1)])
def test_rows_are_not_taken_for_channels(tmp_path: Path, size: tuple[int, int]):
    file = save_picture(tmp_path / "a.png", picture(*size))
    found = ImagePreprocessor(image_model(tmp_path / "model"), VIT)([file])["pixel_values"]
    wanted = normalised(np.asarray(picture(*size).resize((8, 6), Image.Resampling.BILINEAR)))
    np.testing.assert_allclose(found, [wanted], rtol=0, atol=1e-5)


def test_images_are_rotated_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
    turned = save_picture(tmp_path / "a.png", picture(6, 8), exif=exif)
    found = ImagePreprocessor(image_model(tmp_path / "model"), VIT)([turned])["pixel_values"]
    np.testing.assert_allclose(found, [normalised(np.rot90(np.asarray(picture(6, 8)), k=-1))], rtol=0, atol=1e-5)


def spoil(file: Path, how: str) -> None:
    if how == "missing":
        return
    if how == "16 bits":
        Image.fromarray(np.full((6, 8), 40000, np.uint16)).save(file)
    elif how == "cut short":
        save_picture(file, picture(64, 64))
        file.write_bytes(file.read_bytes()[:5000])
    elif how == "postscript":
        picture().save(file, format="EPS")
    else:
        file.write_bytes({"empty": b"", "text": b"a cat\n"}[how])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "No such file or directory"),
        ("empty", "cannot identify image file"),
        ("text", "cannot identify image file"),
        ("postscript", "cannot identify image file"),
        ("cut short", "truncated"),
        ("16 bits", "mode I;16, expected 8 bits per channel"),
    ],
)
def test_a_file_that_is_not_an_image_is_refused(tmp_path: Path, how: str, reason: str):
    preprocess = ImagePreprocessor(image_model(tmp_path / "model"), VIT)
    spoil(tmp_path / "a.png", how)
    with pytest.raises(OptionError, match=reason) as error:
        preprocess([save_picture(tmp_path / "fine.png"), tmp_path / "a.png"])
    message = refusal(error)
    assert message.startswith(f"{tmp_path / 'a.png'}: cannot be read as an image (")
    assert message.endswith("expected one of the formats BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP")


@pytest.mark.parametrize("side", [12, 20])  # a size at which Pillow warns, and one at which it raises
def test_a_decompression_bomb_is_refused(tmp_path: Path, side: int, monkeypatch):
    preprocess = ImagePreprocessor(image_model(tmp_path / "model"), VIT)
    bomb, fine = (
        save_picture(tmp_path / "a.png", picture(side, side)),
        save_picture(tmp_path / "b.png", picture(9, 9)),
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    preprocess([fine])
    with pytest.raises(OptionError, match=r"a\.png.*decompression bomb") as error:
        preprocess([bomb])
    refusal(error)


def test_files_and_texts_are_not_confused(tmp_path: Path):
    with pytest.raises(OptionError) as error:
        ImagePreprocessor(image_model(tmp_path / "images"), VIT)(["a good film"])
    assert refusal(error) == "'a good film' is a text, expected an image file: the model takes images"
    with pytest.raises(OptionError) as error:
        texts_of("bert", text_model(tmp_path / "texts"))([Path("a.png")])
    assert refusal(error) == "a.png is a file, expected a text: the model takes texts"


@pytest.mark.parametrize(
    ("settings", "config", "reason"),
    [
        ({"do_resize": False}, {}, r"different sizes \(\(3, 48, 64\), \(3, 64, 48\)\), expected one that resizes"),
        ({"image_mean": [0.5]}, {}, "cannot be used .*mean must have 3 elements"),
        ({"size": "x"}, {}, "cannot be used .*size"),
        ({"image_processor_type": "NoSuch"}, {}, "cannot be used .*Unrecognized image processor"),
        ({}, {"num_channels": 1}, "cannot be used .*mean must have 1 elements"),
        ({}, {"num_channels": 4}, "takes images of 4 channels, expected 1 or 3"),
        ({}, {"num_channels": "x"}, r"config\.json cannot be used .*num_channels"),
    ],
)
def test_an_unusable_image_processor_is_refused(tmp_path: Path, settings: dict, config: dict, reason: str):
    file = image_model(tmp_path) / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(CheckpointError, match=reason) as error:
        open_preprocessor(tmp_path, IMAGES, {**VIT, **config})
    assert refusal(error).startswith(str(tmp_path))


def test_a_missing_or_broken_image_processor_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError) as error:
        open_preprocessor(tmp_path, IMAGES, VIT)
    assert refusal(error).startswith(
        f"{tmp_path}: no preprocessor_config.json; expected the one the model was trained"
    )
    write(tmp_path / "preprocessor_config.json", "{")
    with pytest.raises(
        CheckpointError, match=r"preprocessor_config\.json: cannot be used .*not a valid JSON"
    ) as error:
        open_preprocessor(tmp_path, IMAGES, VIT)
    refusal(error)


def test_code_in_the_folder_is_not_run(tmp_path: Path):
    write(tmp_path / "code.py", f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for task, name in (
        ("AutoImageProcessor", "preprocessor_config.json"),
        ("AutoTokenizer", "tokenizer_config.json"),
    ):
        names = "code.Own" if task == "AutoImageProcessor" else ["code.Own", "code.Own"]
        write(tmp_path / name, json.dumps({"auto_map": {task: names}}))
    write(tmp_path / "vocab.txt", "")
    for kind, config in ((IMAGES, VIT), (TEXTS, {"model_type": "bert"})):
        with pytest.raises(CheckpointError, match="custom code|trust_remote_code"):
            open_preprocessor(tmp_path, kind, config)
    assert not (tmp_path / "ran").exists()


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError) as error:
        open_preprocessor(image_model(tmp_path), IMAGES, VIT)
    assert refusal(error) == "Pillow is not installed: pip install 'peanut-serve[onnx]'"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"image_size": 32}, (3, 32, 32)),
        ({"image_size": [32, 48]}, (3, 32, 48)),
        ({"image_size": 28, "num_channels": 1}, (1, 28, 28)),
        ({}, (3, 224, 224)),  # ViT's default
    ],
)
def test_without_a_processor_the_config_defines_the_shape(tmp_path: Path, config: dict, wanted: tuple):
    assert image_shape(tmp_path, {**VIT, **config}) == wanted


def test_the_processor_takes_precedence_over_the_config_for_the_shape(tmp_path: Path):
    assert image_shape(image_model(tmp_path), {**VIT, "image_size": 32}) == (3, 6, 8)
    write(tmp_path / "preprocessor_config.json", "{")
    with pytest.raises(CheckpointError):
        image_shape(tmp_path, {**VIT, "image_size": 32})


def test_importing_is_cheap():
    code = "import sys, converters.outputs.onnx.eval_data, converters.inference.preprocessing; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    found = done.stdout.split()
    assert "converters.inference.images" in found
    assert not {"transformers", "torch", "PIL", "onnx", "onnxruntime"} & set(found)
