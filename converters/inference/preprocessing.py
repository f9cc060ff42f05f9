"""Opening the image preprocessor, feature extractor or tokenizer of a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.inference.audio import AudioPreprocessor
from converters.inference.images import ImagePreprocessor
from converters.inference.kinds import ModelKind
from converters.inference.texts import TextPreprocessor


def open_preprocessor(
    folder: Path, kind: ModelKind, config: Mapping[str, Any], max_pixels: int | None = None
) -> AudioPreprocessor | ImagePreprocessor | TextPreprocessor:
    """The preprocessor for graphs of this kind, for the model in `folder` with this config.json.

    `max_pixels` limits images, as of `ImagePreprocessor`.

    Raises `CheckpointError` or `MissingDependencyError` if it cannot be created; see the classes.
    """
    if not kind.takes_files:
        return TextPreprocessor(folder, kind, config)
    if kind.inputs == ("pixel_values",):
        return ImagePreprocessor(folder, config, max_pixels)
    return AudioPreprocessor(folder, kind, config)
