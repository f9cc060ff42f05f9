"""From image files to the inputs of a graph, by the preprocessor_config.json of its model. Nothing is fetched."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import CheckpointError, MissingDependencyError, OptionError
from converters.inference.examples import Example, brief, full_config

PROCESSOR_FILE = "preprocessor_config.json"
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # by content; no EPS, which starts Ghostscript
_MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name
_DUMMY_SIZES = ((48, 64), (64, 48))  # (height, width)


class ImagePreprocessor:
    """Image files to `pixel_values` float32 (batch, channels, height, width).

    Args:
        folder: of a model, with a preprocessor_config.json.
        config: its config.json.

    Attributes:
        shape: (channels, height, width), the same for every image.

    Raises:
        CheckpointError: preprocessor_config.json is missing, unusable, not for the model's channels, or gives images
            of different sizes.
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        _pillow()
        file = folder / PROCESSOR_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: no {PROCESSOR_FILE}; wanted the one the model was trained with, as transformers' "
                "image processors save it: it says how images are resized and normalised"
            )
        self._channels: int = full_config(folder, config).num_channels
        if self._channels not in _MODES:
            raise CheckpointError(f"{folder}: the model takes images of {self._channels} channels, wanted 1 or 3")
        dummies = [np.zeros((self._channels, *size), np.uint8) for size in _DUMMY_SIZES]
        try:
            self._processor = _load_processor(folder)
            shapes = {self._process([dummy]).shape[1:] for dummy in dummies}
        except Exception as error:  # a processor trips over a bad setting wherever it uses it
            raise CheckpointError(f"{file}: cannot be used ({brief(error)})") from None
        if len(shapes) > 1:
            raise CheckpointError(
                f"{file}: gives images of different sizes ({', '.join(str(one) for one in sorted(shapes))}), wanted "
                "one that resizes or crops all to one size"
            )
        self.shape: tuple[int, int, int] = shapes.pop()

    def __call__(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        """Arrays of image files. Raises `OptionError`, naming the file, for one that is missing or broken."""
        images = []
        for example in examples:
            if not isinstance(example, Path):
                raise OptionError(f"{brief(repr(example))} is a text, wanted an image file: the model takes images")
            images.append(read_image(example, self._channels))
        return {"pixel_values": self._process(images)}

    def _process(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        # said and not guessed: an image of 3 rows looks like one with its channels first
        found = self._processor(images, return_tensors="np", input_data_format="channels_first")
        pixels: NDArray[np.float32] = found["pixel_values"].astype(np.float32)
        return pixels


def image_shape(folder: Path, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(channels, height, width) of what the model in `folder` is given; without a preprocessor, of its config.

    Raises as `ImagePreprocessor`, except that preprocessor_config.json may be missing.
    """
    if (folder / PROCESSOR_FILE).is_file():
        return ImagePreprocessor(folder, config).shape
    model = full_config(folder, config)
    size = model.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return model.num_channels, height, width


def read_image(file: Path, channels: int) -> NDArray[np.uint8]:
    """An image as (channels, height, width), upright as its EXIF says; `channels` is 1 (grey) or 3 (RGB).

    Raises `OptionError` if it is missing, broken, no image, one of more than 8 bits a channel (Pillow would clip it),
    or so large that Pillow takes it for a decompression bomb.
    """
    images, operations = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", images.DecompressionBombWarning)
            with images.open(file, formats=_FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {image.mode}, wanted 8 bits a channel")
                pixels = np.array(operations.exif_transpose(image).convert(_MODES[channels]))
    except Exception as error:  # on a broken file every format raises something else
        raise OptionError(
            f"{file}: cannot be read as an image ({brief(error)}); wanted a file of the format {', '.join(_FORMATS)}"
        ) from None
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def _pillow() -> tuple[ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingDependencyError("Pillow is not installed: pip install 'peanut-serve[onnx]'") from None
    return Image, ImageOps


def _load_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    # "pil" also where torchvision is installed: the two resize differently, and an export is to be measured alike
    return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)
