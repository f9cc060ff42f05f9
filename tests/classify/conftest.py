"""Exports that the tests of servers of classifiers share: tracing them takes a while."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `support.classify.exports.export_all`. Not to be changed."""
    from support.classify.exports import export_all

    return export_all(tmp_path_factory.mktemp("exports"))
