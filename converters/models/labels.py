"""Class labels on disk."""

import json
from pathlib import Path

from converters.errors import AdapterConfigError, OptionError, PeanutError
from converters.files.json_files import read_json
from converters.models import config as model_config


def read_labels(path: Path, error_class: type[PeanutError] = OptionError) -> list[str]:
    """Class labels from a JSON list, an object from '0', '1', ..., or an object with such an `id2label`.

    Raises `error_class` for anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            value = value.get("id2label", value)
            value = [value[str(i)] for i in range(len(value))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise error_class(
            f"{path}: wanted a JSON list of labels, or an object from '0', '1', ... ({error})"
        ) from None
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value) or not value:
        raise error_class(f"{path}: wanted a JSON list of strings")
    if len(set(value)) != len(value):
        raise error_class(f"{path}: a label stands twice")
    return value


def labels_beside(adapter: Path) -> tuple[str, ...] | None:
    """Labels recorded with an adapter, if there are any.

    They stand in the `labels.json` of its folder, or as `id2label` in a config.json there. For an adapter that is
    a file only the config beside it counts: there may be files of other tasks, and a `labels.json` of one of them.

    Raises `AdapterConfigError` when the file is damaged.
    """
    folder = adapter if adapter.is_dir() else adapter.parent
    if adapter.is_dir() and (folder / "labels.json").is_file():
        return tuple(read_labels(folder / "labels.json", AdapterConfigError))
    if (folder / "config.json").is_file():
        labels = model_config.labels_of(read_json(folder / "config.json", "model config", AdapterConfigError))
        return tuple(labels) if labels else None
    return None
