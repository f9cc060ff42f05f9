"""JSON that is not what it should be is an error of ours, whatever its size and depth."""

from pathlib import Path

import pytest

from converters.errors import AdapterConfigError, CheckpointError, PeanutError
from converters.files.json_files import read_json
from converters.models.labels import read_labels


def test_deep_large_and_broken_files(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content, reason in (
        ("[" * 1_000_000, "too deeply nested"),
        ('{"a":' * 1_000_000, "too deeply nested"),
        ("{", "Expecting"),
        ("[]", "is a JSON list, expected an object"),
    ):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=reason):
            read_json(file, "config")
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(AdapterConfigError, match="cannot read the labels"):
        read_json(file, "labels", AdapterConfigError)
    with pytest.raises(PeanutError):
        read_labels(file)


def test_a_sparse_file_is_not_read_into_memory(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as opened:
        opened.truncate(2 << 30)
    with pytest.raises(CheckpointError, match="larger than 64 MiB"):
        read_json(file, "config")
    with pytest.raises(PeanutError, match="larger than 64 MiB"):
        read_labels(file)
