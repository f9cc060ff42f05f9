"""Digests change when results do, and not with every version of the package."""

import hashlib
import json

import pytest
from support.golden import LLM
from support.project.evaluated import changed, evaluated, recorded

from converters import open_checkpoint
from converters.files.reader import TensorReader
from peanut_serve.variants.backup import checking
from peanut_serve.variants.opening import VersionOpener
from peanut_serve.variants.version import EVALUATION, LoadedModel, digest_of

RAISE = "what is computed has changed: set EVALUATION in peanut_serve/variants/version.py to the next version, run "
RAISE += "PYTHONPATH=tests python -m support.project.evaluated, and say so in CHANGELOG.md"


def test_the_results_of_all_methods_are_those_of_the_record() -> None:
    version, before = recorded()
    assert version == EVALUATION, RAISE
    assert changed() == [], RAISE
    assert evaluated().keys() == before.keys(), "run PYTHONPATH=tests python -m support.project.evaluated"


def test_recorded_digests_stay() -> None:
    assert EVALUATION == "0.1.0", "then the digests below are others"
    assert digest_of("merged", "a" * 40, "b" * 40) == "f4dea1253b831220196206aa45caac3b6e913dab"
    assert digest_of("base", "b" * 40) == "7bef8a06024533bea0a0a8ec58071da66439cdc6"


def test_the_digest_of_an_adapter_stays() -> None:
    """And what it evaluates to, byte by byte."""
    base = open_checkpoint(LLM / "gqa" / "base")
    opener = VersionOpener(LoadedModel(base, [[name] for name in base.tensors]), "cpu")
    version = opener.adapter("gqa", LLM / "gqa" / "adapter")
    weights = version.evaluate()
    try:
        with TensorReader() as reader:
            hashes = {name: reader.hash(info) for name, info in sorted(weights.tensors.items())}
    finally:
        weights.close()
    found = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:40]
    assert version.digest == "30c0a4ed9243e2f964eac858365fb06c41878046"
    assert found == "d4e10f37c88b13806ec65445c8cf41b58e91df02", RAISE


@pytest.mark.parametrize(
    ("version", "is_alike"),
    [("0.1.0", True), ("0.1.5", True), ("0.2.0", True), ("0.0.9", False), ("0.3.0", False), ("unknown", False)],
)
def test_versions_with_the_same_results(version: str, is_alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "__version__", "0.2.0")
    assert checking._evaluates_alike(version) == is_alike
