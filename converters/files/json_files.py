"""JSON objects on disk."""

import json
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, PeanutError


def read_json(path: Path, what: str, error_class: type[PeanutError] = CheckpointError) -> dict[str, Any]:
    """Read a JSON object. Raises `error_class`, naming `what`, if the file cannot be read or is not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise error_class(f"{path}: cannot read the {what} ({error})") from None
    if not isinstance(value, dict):
        raise error_class(f"{path}: the {what} is a JSON {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON in the style of transformers' configs."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
