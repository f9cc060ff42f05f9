"""JSON objects on disk."""

import json
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, PeanutError


def read_json(path: Path, what: str, error_class: type[PeanutError] = CheckpointError) -> dict[str, Any]:
    """A JSON object from `path`. Raises `error_class`, naming `what`, if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise error_class(f"{path}: cannot read the {what} ({error})") from None
    if not isinstance(value, dict):
        raise error_class(f"{path}: the {what} is a JSON {type(value).__name__}, wanted an object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON the way transformers writes its configs."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
