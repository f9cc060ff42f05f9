"""What models are given, and what makes inputs of it. transformers is imported on first use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from converters.errors import CheckpointError

Example = Path | str | tuple[str, str]  # an image file, a text, a pair of texts
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Preprocessor(Protocol):
    """Makes a batch of some examples."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        """The inputs by name, as `Kind.inputs` describes them. Raises `OptionError` for what cannot be one."""
        ...


def full_config(folder: Path, config: Mapping[str, Any]) -> Any:
    """`config` with the defaults of its model type, under the names that all model types share."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # configs check themselves, each in its way
        raise CheckpointError(f"{folder}: config.json cannot be used ({brief(error)})") from None


def brief(what: object) -> str:
    """In one line, and not a long one."""
    return " ".join(str(what).split())[:200]
