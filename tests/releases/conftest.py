"""A rig whose variants a test may change, in every mode."""

import shutil
from pathlib import Path

import pytest
from support.server.rig import RunRig, make_weights, rig_runner
from support.server.weights import Weights


@pytest.fixture(scope="package")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("releases"))


@pytest.fixture
def tasks(weights: Weights, tmp_path: Path) -> Path:
    """This test's own copy of the variants."""
    return Path(shutil.copytree(weights.tasks, tmp_path / "tasks"))


@pytest.fixture
def run_rig(weights: Weights, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    run = rig_runner(weights, tmp_path, monkeypatch)
    return lambda test, **options: run(test, **{"roots": (str(tasks),), **options})
