"""Examples for a model, and the protocol that turns them into inputs. transformers is imported on first use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from converters.errors import CheckpointError

# a file (image or sound), the content of one that a client sent, a text, a pair of texts
Example = Path | bytes | str | tuple[str, str]
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Preprocessor(Protocol):
    """Turns examples into one batch."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        """The inputs by name, as in `ModelKind.inputs`. Raises `OptionError` for an unusable example."""
        ...


def full_config(folder: Path, config: Mapping[str, Any]) -> Any:
    """`config` with the defaults of its model type, under the attribute names that all model types share.

    Raises `CheckpointError` if transformers rejects it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # each config class validates itself in its own way
        raise CheckpointError(f"{folder}: config.json cannot be used ({brief(error)})") from None


def brief(what: object) -> str:
    """The text in a single line, cut to 200 characters."""
    return " ".join(str(what).split())[:200]
