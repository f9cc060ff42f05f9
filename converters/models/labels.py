"""Reading class labels from disk."""

from pathlib import Path

from converters.errors import AdapterConfigError, OptionError, PeanutError
from converters.files.json_files import parse_json, read_json
from converters.models import config as model_config


def read_labels(path: Path, error_class: type[PeanutError] = OptionError) -> list[str]:
    """Read class labels from a JSON list, an object with the keys '0', '1', ..., or a config with such an `id2label`.

    Raises `error_class` for anything else.
    """
    try:
        value = parse_json(path)
        if isinstance(value, dict):
            value = value.get("id2label", value)
            value = [value[str(i)] for i in range(len(value))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise error_class(
            f"{path}: expected a JSON list of labels, or an object with keys '0', '1', ... ({error})"
        ) from None
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value) or not value:
        raise error_class(f"{path}: expected a non-empty JSON list of strings")
    if len(set(value)) != len(value):
        raise error_class(f"{path}: a label occurs twice; labels must be unique")
    return value


def labels_beside(adapter: Path) -> tuple[str, ...] | None:
    """Labels recorded with an adapter, or None.

    They are read from `labels.json` in its folder, or from `id2label` in the config.json there. For a single-file
    adapter only the config next to it is read: a `labels.json` may belong to another task in that folder.

    Raises `AdapterConfigError` if the file is damaged.
    """
    folder = adapter if adapter.is_dir() else adapter.parent
    if adapter.is_dir() and (folder / "labels.json").is_file():
        return tuple(read_labels(folder / "labels.json", AdapterConfigError))
    if (folder / "config.json").is_file():
        labels = model_config.labels_of(read_json(folder / "config.json", "model config", AdapterConfigError))
        return tuple(labels) if labels else None
    return None
