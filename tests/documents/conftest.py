"""The folders that the documents speak of."""

from pathlib import Path

import pytest
from support.project.document_folders import language_folders, vision_and_text_folders
from support.tiny_models import Pair


@pytest.fixture
def folders(pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Bases, adapters and inputs under the names that commands and snippets use; the current folder."""
    pair.base.rename(tmp_path / "llama2-7b")
    pair.adapter.rename(tmp_path / "gsm8k")
    language_folders(tmp_path)
    vision_and_text_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
