"""Opening the image preprocessor or tokenizer of a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.inference.images import ImagePreprocessor
from converters.inference.kinds import ModelKind
from converters.inference.texts import TextPreprocessor


def open_preprocessor(
    folder: Path, kind: ModelKind, config: Mapping[str, Any]
) -> ImagePreprocessor | TextPreprocessor:
    """The preprocessor for graphs of this kind, for the model in `folder` with this config.json.

    Raises `CheckpointError` or `MissingDependencyError` if it cannot be created; see the two classes.
    """
    return ImagePreprocessor(folder, config) if kind.takes_files else TextPreprocessor(folder, kind, config)
