"""Preprocessing of image files according to a model's preprocessor_config.json. Nothing is downloaded."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import CheckpointError, MissingDependencyError, OptionError
from converters.inference.examples import Example, brief, full_config
from converters.inference.media_models import image_config

PROCESSOR_FILE = "preprocessor_config.json"
_FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # detected by content; without EPS, which runs Ghostscript
_MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode
_DUMMY_SIZES = ((48, 64), (64, 48))  # (height, width)


class ImagePreprocessor:
    """Turns image files into `pixel_values`, float32 (batch, channels, height, width).

    Args:
        folder: the folder of a model with a preprocessor_config.json.
        config: the config.json of the model.
        max_pixels: larger images are refused before they are decoded; by default those that Pillow considers a
            decompression bomb.

    Attributes:
        shape: (channels, height, width), the same for every image.

    Raises:
        CheckpointError: preprocessor_config.json is missing or unusable, does not match the model's channels, or
            produces images of different sizes.
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], max_pixels: int | None = None) -> None:
        _pillow()
        self._max_pixels = max_pixels
        file = folder / PROCESSOR_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: no {PROCESSOR_FILE}; expected the one the model was trained with, as saved by "
                "transformers' image processors: it defines how images are resized and normalised"
            )
        self._channels: int = image_config(full_config(folder, config)).num_channels
        if self._channels not in _MODES:
            raise CheckpointError(f"{folder}: the model takes images of {self._channels} channels, expected 1 or 3")
        dummies = [np.zeros((self._channels, *size), np.uint8) for size in _DUMMY_SIZES]
        try:
            self._processor = _load_processor(folder)
            shapes = {self._process([dummy]).shape[1:] for dummy in dummies}
        except Exception as error:  # a processor fails on a bad setting wherever it uses it
            raise CheckpointError(f"{file}: cannot be used ({brief(error)})") from None
        if len(shapes) > 1:
            raise CheckpointError(
                f"{file}: produces images of different sizes ({', '.join(str(one) for one in sorted(shapes))}), "
                "expected one that resizes or crops all images to one size"
            )
        self.shape: tuple[int, int, int] = shapes.pop()

    def __call__(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        """The arrays of images. Raises `OptionError`, naming the file, if one is missing, broken or too large."""
        images = []
        for example in examples:
            if not isinstance(example, Path | bytes):
                raise OptionError(f"{brief(repr(example))} is a text, expected an image file: the model takes images")
            images.append(read_image(example, self._channels, self._max_pixels))
        return {"pixel_values": self._process(images)}

    def _process(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        # stated, since a guess would take an image of 3 rows for one with its channels first
        found = self._processor(images, return_tensors="np", input_data_format="channels_first")
        pixels: NDArray[np.float32] = found["pixel_values"].astype(np.float32)
        return pixels


def image_shape(folder: Path, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(channels, height, width) of the input of the model in `folder`, from its preprocessor or else its config.

    Raises the same errors as `ImagePreprocessor`; preprocessor_config.json may be missing if the config has a size.
    """
    if (folder / PROCESSOR_FILE).is_file():
        return ImagePreprocessor(folder, config).shape
    model = image_config(full_config(folder, config))
    size = getattr(model, "image_size", None)
    if size is None:
        raise CheckpointError(
            f"{folder}: no {PROCESSOR_FILE}, and no image_size in config.json; expected the preprocessor the model "
            "was trained with: it defines the size of the images"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return model.num_channels, height, width


def read_image(file: Path | bytes, channels: int, max_pixels: int | None = None) -> NDArray[np.uint8]:
    """Read an image as (channels, height, width), rotated according to its EXIF data. Safe in threads.

    Args:
        file: a file, or its content.
        channels: 1 (grey) or 3 (RGB).
        max_pixels: the most that are decoded; by default, and at most, as many as Pillow allows.

    Raises `OptionError` if the file is missing, broken or not an image, has more than 8 bits per channel (Pillow
    would clip it), or has too many pixels: it may be a decompression bomb.
    """
    images, operations = _pillow()
    most = min(max_pixels or images.MAX_IMAGE_PIXELS, images.MAX_IMAGE_PIXELS)
    try:
        with images.open(BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > most:  # nothing but the header has been read
                raise ValueError(f"{width} x {height} pixels, at most {most} are decoded: a decompression bomb?")
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}, expected 8 bits per channel")
            pixels = np.array(operations.exif_transpose(image).convert(_MODES[channels]))
    except Exception as error:  # each format raises different exceptions for a broken file
        where = f"what was sent ({len(file)} bytes)" if isinstance(file, bytes) else str(file)
        raise OptionError(
            f"{where}: cannot be read as an image ({brief(error)}); expected one of the formats {', '.join(_FORMATS)}"
        ) from None
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def _pillow() -> tuple[ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingDependencyError("Pillow is not installed: pip install 'peanut-serve[onnx]'") from None
    return Image, ImageOps


def image_size(content: bytes) -> tuple[int, int]:
    """(width, height) of an image, of which only the header is read. Raises `OptionError` if it is not an image."""
    images, _ = _pillow()
    try:
        with images.open(BytesIO(content), formats=_FORMATS) as image:
            width, height = image.size
    except Exception as error:  # as in `read_image`
        raise OptionError(
            f"what was sent ({len(content)} bytes) cannot be read as an image ({type(error).__name__}); "
            f"expected one of the formats {', '.join(_FORMATS)}"
        ) from None
    return width, height


def _load_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    # "pil" even if torchvision is installed: the two resize differently, and exports must be measured consistently
    return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)
