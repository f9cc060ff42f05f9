"""JSON objects on disk."""

import json
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, PeanutError

# the index of a model with a hundred thousand tensors has 10 MiB; a larger file would only fill the memory
_MOST_BYTES = 64 << 20


def parse_json(path: Path) -> Any:
    """Read JSON in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark, as editors on Windows write it.

    Raises `OSError`, and `ValueError` if the file is not JSON, is too large or too deeply nested.
    """
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MiB")
    try:
        return json.loads(data.decode(json.detect_encoding(data)))
    except RecursionError:
        raise ValueError("it is too deeply nested") from None


def read_json(path: Path, what: str, error_class: type[PeanutError] = CheckpointError) -> dict[str, Any]:
    """Read a JSON object. Raises `error_class`, naming `what`, if the file cannot be read or is not an object."""
    try:
        value = parse_json(path)
    except (OSError, ValueError) as error:
        raise error_class(f"{path}: cannot read the {what} ({error})") from None
    if not isinstance(value, dict):
        raise error_class(f"{path}: the {what} is a JSON {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON in the style of transformers' configs."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
