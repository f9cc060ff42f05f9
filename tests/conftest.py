"""Fixtures shared by the tests: tiny models with trained-looking adapters, a real base, the commands."""

import atexit
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# graphs that tests trace stay out of the cache of whoever runs them, and workers of pytest-xdist share theirs; it is
# read when huggingface_hub is imported
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp(prefix="peanut-assets-")
    atexit.register(shutil.rmtree, os.environ["HF_ASSETS_CACHE"], ignore_errors=True)

import hypothesis
import pytest
from hypothesis import HealthCheck
from support.commands import Run, built
from support.paths import MINILM, SMOLLM2, VIT_SMALL

# the fixtures import torch, transformers and peft: the process that only hands tests to pytest-xdist's workers needs
# none of them, and workers start six seconds earlier
if TYPE_CHECKING:
    from support.tiny_models import Pair
    from transformers import PreTrainedModel

# `make soak` takes the longer one
_SOAK = hypothesis.settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))
hypothesis.settings.register_profile("soak", _SOAK)
hypothesis.settings.register_profile("test", _SOAK, max_examples=100, derandomize=True)
hypothesis.settings.load_profile("test")


REAL_MODELS = {"smollm2", "vit_small", "minilm"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test with a real model is slow."""
    for item in items:
        if REAL_MODELS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


@pytest.fixture
def make_pair(tmp_path: Path) -> Callable[..., "Pair"]:
    """Save a model as a base and an adapter for it; by default a tiny Llama in float32."""
    import torch
    from support.tiny_models import Pair, save_adapter, tiny_llama

    def make(model: "PreTrainedModel | None" = None, dtype: torch.dtype = torch.float32, **settings: object) -> Pair:
        torch.manual_seed(0)
        model = (model or tiny_llama()).to(dtype)
        pair = Pair(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        model.save_pretrained(pair.base)
        save_adapter(model, pair.adapter, **settings)
        return pair

    return make


@pytest.fixture
def pair(make_pair: Callable[..., "Pair"]) -> "Pair":
    return make_pair()


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run` in this process: all but the start of the interpreter and the imports, which take seconds."""
    import peanut_serve.cli
    from converters.cli import main as cli

    mains = {
        "peanut-merge": cli.merge_main,
        "peanut-inspect": cli.inspect_main,
        "peanut-serve": peanut_serve.cli.main,
    }

    def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        environment = dict(os.environ)
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                mains[str(command[0])]()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.environ.clear()
            os.environ.update(environment)  # peanut-serve leaves it for vLLM's processes
            gc.unfreeze()  # the commands freeze what is imported, here that of all tests
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(command, int(ended.value.code or 0), shown.out, shown.err)

    return call


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return built(SMOLLM2, "make_smollm2.py")


@pytest.fixture(scope="session")
def vit_small() -> Path:
    return built(VIT_SMALL, "make_vit_small.py")


@pytest.fixture(scope="session")
def minilm() -> Path:
    return built(MINILM, "make_minilm.py")
