"""From image files or texts to the inputs of a graph, by what lies beside a model. Nothing is fetched.

Importing it is cheap: transformers and Pillow are imported on first use.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from converters.errors import CheckpointError, MissingDependencyError, OptionError
from converters.onnx_export.kinds import Kind

Example = Path | str | tuple[str, str]  # an image file, a text, a pair of texts

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
PROCESSOR_FILE = "preprocessor_config.json"

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # by content; no EPS, which starts Ghostscript
_MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name
_DUMMY_SIZES = ((48, 64), (64, 48))  # (height, width)

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model")
_POSITIONS_AFTER_PAD = ("roberta", "xlm-roberta", "camembert")  # the first token is at position pad_token_id + 1


class Preprocessor(Protocol):
    """Makes a batch of some examples."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        """The inputs by name, as `Kind.inputs` describes them. Raises `OptionError` for what cannot be one."""
        ...


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
        self._channels: int = _full_config(folder, config).num_channels
        if self._channels not in _MODES:
            raise CheckpointError(f"{folder}: the model takes images of {self._channels} channels, wanted 1 or 3")
        dummies = [np.zeros((self._channels, *size), np.uint8) for size in _DUMMY_SIZES]
        try:
            self._processor = _load_processor(folder)
            shapes = {self._process([dummy]).shape[1:] for dummy in dummies}
        except Exception as error:  # a processor trips over a bad setting wherever it uses it
            raise CheckpointError(f"{file}: cannot be used ({_brief(error)})") from None
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
                raise OptionError(f"{_brief(repr(example))} is a text, wanted an image file: the model takes images")
            images.append(read_image(example, self._channels))
        return {"pixel_values": self._process(images)}

    def _process(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        # said and not guessed: an image of 3 rows looks like one with its channels first
        found = self._processor(images, return_tensors="np", input_data_format="channels_first")
        pixels: NDArray[np.float32] = found["pixel_values"].astype(np.float32)
        return pixels


class TextPreprocessor:
    """Texts and pairs of texts to int64 (batch, longest), each cut to what the model takes and padded at its end.

    Padded at the end whatever the tokenizer says: the positions of GPT-2 count from the first column. With the
    `pad_token_id` of the config, if it has one: by it a classifier on a decoder finds the last token, and RoBERTa its
    positions.

    Args:
        folder: of a model, with a tokenizer.
        kind: whose inputs are wanted.
        config: the model's config.json.

    Attributes:
        max_length: tokens of the longest sequence, special ones included.
        pad_id: what pads `input_ids`; the other inputs are padded with 0.

    Raises `CheckpointError` if the tokenizer is missing, unusable, or has nothing to pad with.
    """

    def __init__(self, folder: Path, kind: Kind, config: Mapping[str, Any]) -> None:
        self._folder, self._names = folder, kind.inputs
        model = _full_config(folder, config)
        self._tokenizer = _load_tokenizer(folder)
        self._vocab_size: int = model.vocab_size
        positions = model.max_position_embeddings
        if model.model_type in _POSITIONS_AFTER_PAD:
            positions -= model.pad_token_id + 1
        self.max_length = int(min(self._tokenizer.model_max_length, positions))
        known = (model.pad_token_id, self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        pad_id = next((one for one in known if one is not None and 0 <= one < self._vocab_size), None)
        if pad_id is None:
            raise CheckpointError(
                f"{folder}: nothing to pad texts with; wanted a pad_token_id in config.json, or a pad_token or "
                "eos_token of the tokenizer"
            )
        self.pad_id: int = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        """Arrays of texts.

        Raises:
            OptionError: an example is a file, or has no tokens.
            CheckpointError: the model has no embedding of a token.
        """
        rows = [self._encode(example) for example in examples]
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        arrays = {name: np.full(shape, self.pad_id if name == "input_ids" else 0, np.int64) for name in self._names}
        for i, row in enumerate(rows):
            for name, array in arrays.items():
                array[i, : len(row[name])] = row[name]
        largest = arrays["input_ids"].max()
        if largest >= self._vocab_size:
            raise CheckpointError(
                f"{self._folder}: the tokenizer gives the token {largest}, the model has {self._vocab_size}; "
                "wanted the tokenizer the model was trained with"
            )
        return arrays

    def spans(self, text: str) -> list[tuple[int, int] | None]:
        """Where the tokens of a text lie in it, (start, end) for each of its row; None for special ones.

        Raises:
            OptionError: the text is longer than what the model takes.
            CheckpointError: the tokenizer does not know where tokens lie.
        """
        if not self._tokenizer.is_fast:
            raise CheckpointError(
                f"{self._folder}: its tokenizer does not say where tokens lie; wanted one with a tokenizer.json"
            )
        found = self._tokenizer([text], return_offsets_mapping=True, return_special_tokens_mask=True)
        places, special = found["offset_mapping"][0], found["special_tokens_mask"][0]
        if len(places) > self.max_length:
            raise OptionError(
                f"the text {_brief(repr(text))} has {len(places)} tokens, and the model takes {self.max_length}; "
                "split it: of the rest nothing would be said"
            )
        return [None if mask else tuple(place) for place, mask in zip(places, special, strict=True)]

    def _encode(self, example: Example) -> Mapping[str, list[int]]:
        if isinstance(example, Path):
            raise OptionError(f"{example} is a file, wanted a text: the model takes texts")
        # as a list of one: transformers 5.19 takes a lone text with an empty second one for no pair
        texts = ([example[0]], [example[1]]) if isinstance(example, tuple) else ([example],)
        wanted = {
            f"return_{name}": True for name in self._names if name != "input_ids"
        }  # by default not all are given
        found = self._tokenizer(*texts, truncation=True, max_length=self.max_length, **wanted)
        if not found["input_ids"][0]:
            raise OptionError(f"the text {_brief(repr(texts[0][0]))} has no tokens, wanted at least one")
        return {name: found[name][0] for name in self._names}


def open_preprocessor(folder: Path, kind: Kind, config: Mapping[str, Any]) -> ImagePreprocessor | TextPreprocessor:
    """What makes the inputs of a graph of this kind, for the model in `folder` with this config.json.

    Raises `CheckpointError`, or `MissingDependencyError`, if it cannot be made; see the classes.
    """
    return ImagePreprocessor(folder, config) if kind.takes_images else TextPreprocessor(folder, kind, config)


def image_shape(folder: Path, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(channels, height, width) of what the model in `folder` is given; without a preprocessor, of its config.

    Raises as `ImagePreprocessor`, except that preprocessor_config.json may be missing.
    """
    if (folder / PROCESSOR_FILE).is_file():
        return ImagePreprocessor(folder, config).shape
    model = _full_config(folder, config)
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
            f"{file}: cannot be read as an image ({_brief(error)}); wanted a file of the format {', '.join(_FORMATS)}"
        ) from None
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def _pillow() -> tuple[ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingDependencyError("Pillow is not installed: pip install 'peanut-serve[onnx]'") from None
    return Image, ImageOps


def _full_config(folder: Path, config: Mapping[str, Any]) -> Any:
    """`config` with the defaults of its model type, under the names that all model types share."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # configs check themselves, each in its way
        raise CheckpointError(f"{folder}: config.json cannot be used ({_brief(error)})") from None


def _load_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    # "pil" also where torchvision is installed: the two resize differently, and an export is to be measured alike
    return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # without a vocabulary transformers makes a tokenizer that knows no words, and says nothing
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(f"{folder}: no tokenizer; wanted one of {', '.join(_VOCABULARIES)}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise CheckpointError(f"{folder}: the tokenizer cannot be used ({_brief(error)})") from None


def _brief(what: object) -> str:
    return " ".join(str(what).split())[:200]
