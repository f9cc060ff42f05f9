"""Fixtures shared by the tests: tiny models with trained-looking adapters, a real base, the commands."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from peft import PeanutConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
SMOLLM2 = ROOT / "build" / "bases" / "smollm2-135m-instruct"
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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real pretrained model, built from a PyPI package (`make test` has done it)."""
    if not (SMOLLM2 / "config.json").exists():
        subprocess.run([sys.executable, ROOT / "examples" / "make_smollm2.py", SMOLLM2], check=True)
    return SMOLLM2
