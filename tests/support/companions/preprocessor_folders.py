"""Folders of preprocessors and tokenizers for the tests, their pictures, and what they say when they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from converters.errors import PeanutError
from converters.inference.kinds import INPUTS, ModelKind
from converters.inference.preprocessing import open_preprocessor
from converters.inference.texts import TextPreprocessor

VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
SETTINGS = {"size": {"height": 6, "width": 8}, "image_mean": MEAN, "image_std": STD}
IMAGES = ModelKind("image-classification", INPUTS["vit"], ("logits",))
TEXTS = ModelKind("text-classification", INPUTS["bert"], ("logits",))
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "<end>")
PAD, UNK, CLS, SEP, GOOD, BAD, FILM, END = range(8)
LABELS = ("cat", "dog", "horse")


def picture(width: int = 11, height: int = 7, seed: int = 0, bands: int = 3) -> Image.Image:
    """Noise, so that a pixel out of its place is seen."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)
    return Image.fromarray(noise if bands > 1 else noise[..., 0])


def save_picture(file: Path, image: Image.Image | None = None, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(file, **options)
    return file


def normalised(pixels: np.ndarray) -> np.ndarray:
    """(height, width, channels) as the graph wants them, by the plain formula."""
    return ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)


def image_model(folder: Path, **settings: Any) -> Path:
    ViTImageProcessorPil(**{**SETTINGS, **settings}).save_pretrained(folder)
    return folder


def text_model(
    folder: Path, template: bool = True, pad: str | None = "[PAD]", eos: str | None = None, **options: Any
) -> Path:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    if template:
        words.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, eos_token=eos, **options).save_pretrained(folder)
    return folder


def texts_of(model_type: str, folder: Path, **settings: Any) -> TextPreprocessor:
    kind = ModelKind("text-classification", INPUTS[model_type], ("logits",))
    found = open_preprocessor(folder, kind, {"model_type": model_type, "vocab_size": len(WORDS), **settings})
    assert isinstance(found, TextPreprocessor)
    return found


def write(file: Path, text: str, encoding: str = "utf-8") -> Path:
    file.write_bytes(text.encode(encoding))
    return file


def refusal(error: pytest.ExceptionInfo[PeanutError]) -> str:
    """The message, of which there is one line."""
    message = str(error.value)
    assert "\n" not in message
    return message
