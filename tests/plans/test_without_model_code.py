"""Adapters of embeddings and heads on plain decoders: the same plan with and without transformers' model code."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft import PeftConfig
from support.peft_methods import train
from support.sweep.small_configs import small_config
from support.tiny_models import edit_json

from converters import load_adapter, merge, prepare_merge
from converters.errors import PeanutError
from converters.models import plain_decoders, stored_names
from converters.plans.merge import Plan

TOKENS = [13, 3, 7]
LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def lora(*targets: str, **settings: Any) -> Callable[[], PeftConfig]:
    return lambda: peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **LM, **settings)


def tokens(*targets: str) -> Callable[[], PeftConfig]:
    return lambda: peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=list(targets), **LM)


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "the embedding": lora("embed_tokens"),
    "the embedding beside layers": lora("embed_tokens", "q_proj", "down_proj"),
    "DoRA of the embedding": lora("embed_tokens", use_dora=True),
    "the head": lora("lm_head", "v_proj"),
    "both with the tie": lora("embed_tokens", "lm_head", ensure_weight_tying=True),
    "tokens": tokens("embed_tokens"),
    "tokens beside layers": lora("q_proj", trainable_token_indices=TOKENS),
    "tokens of both": lora("q_proj", trainable_token_indices={"embed_tokens": TOKENS, "lm_head": [1, 13]}),
    "a saved embedding": lora("q_proj", modules_to_save=["embed_tokens"]),
    "a saved head": lora("q_proj", modules_to_save=["lm_head"]),
    "both saved": lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm", "input_layernorm"], **LM),
    "biases": lora("q_proj", bias="all"),
}
MODELS = {
    ("qwen2", True): tf.Qwen2ForCausalLM,
    ("llama", False): tf.LlamaForCausalLM,
}


@dataclass(frozen=True)
class Trained:
    base: Path
    adapter: Path


def trained(model: tuple[str, bool], name: str, folder: Path) -> Trained:
    model_type, tied = model
    torch.manual_seed(0)
    plain = MODELS[model](small_config(model_type, tie_word_embeddings=tied))
    made = Trained(folder / "base", folder / name.replace(" ", "-"))
    train(plain, CONFIGS[name](), made.base, made.adapter)
    return made


def facts(plan: Plan) -> tuple[object, ...]:
    return dict(plan.shards), dict(plan.dropped), dict(plan.config), dict(plan.options), plan.notes


def outcome(base: Path, adapters: Path | Sequence[Path]) -> object:
    """What the plan says, or the refusal."""
    try:
        return facts(prepare_merge(base, adapters))
    except PeanutError as error:
        return type(error), str(error)


def both(base: Path, adapters: Path | Sequence[Path], monkeypatch: pytest.MonkeyPatch) -> tuple[object, object]:
    """The outcome by the table, where transformers may not be asked, and that by transformers alone."""
    with monkeypatch.context() as by_table:
        by_table.setattr(plain_decoders, "build_architecture", None)
        by_table.setattr(stored_names, "build_architecture", None)
        found = outcome(base, adapters)
    with monkeypatch.context() as by_transformers:
        by_transformers.setattr(plain_decoders, "DECODERS", {})
        return found, outcome(base, adapters)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways_give_the_same_plan(
    name: str, model: tuple[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained(model, name, tmp_path)
    found, wanted = both(made.base, made.adapter, monkeypatch)
    assert found == wanted
    assert isinstance(found, tuple) and isinstance(found[0], dict)  # and no refusal


def test_both_ways_give_the_same_plan_of_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [trained(("qwen2", True), name, tmp_path) for name in ("the embedding", "tokens", "the head")]
    paths = [one.adapter for one in parts]
    found, wanted = both(parts[0].base, paths[:2], monkeypatch)
    assert found == wanted
    found, wanted = both(parts[0].base, paths[1:], monkeypatch)
    assert found == wanted


def test_both_ways_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained(("qwen2", True), "DoRA of the embedding", tmp_path)
    merge(made.base, made.adapter, tmp_path / "by-table")
    monkeypatch.setattr(plain_decoders, "DECODERS", {})
    merge(made.base, made.adapter, tmp_path / "by-transformers")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "by-table" / name).read_bytes() == (tmp_path / "by-transformers" / name).read_bytes()


def test_both_ways_refuse_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained(("llama", False), "tokens beside layers", tmp_path)
    edit_json(made.adapter / "adapter_config.json", trainable_token_indices=[126, 127, 999])
    found, wanted = both(made.base, made.adapter, monkeypatch)
    assert found == wanted
    assert "token 999 was trained" in str(found)
    lost = trained(("llama", False), "the embedding beside layers", tmp_path / "lost")
    edit_json(lost.adapter / "adapter_config.json", target_modules=["embed_tokens", "q_proj", "k_proj", "down_proj"])
    found, wanted = both(lost.base, lost.adapter, monkeypatch)
    assert found == wanted
    assert "k_proj" in str(found) and "should have θ" in str(found)


def test_no_model_code_is_imported(tmp_path: Path) -> None:
    """In a process of its own, since the tests import it."""
    made = [trained(("qwen2", True), name, tmp_path / f"{i}") for i, name in enumerate(CONFIGS)]
    assert all(load_adapter(one.adapter).modules or load_adapter(one.adapter).saved for one in made)
    pairs = [(str(one.base), str(one.adapter)) for one in made]
    code = (
        "import sys, converters\n"
        f"for base, adapter in {pairs!r}:\n"
        "    converters.prepare_merge(base, adapter)\n"
        "    if 'transformers' in sys.modules: sys.exit(adapter)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
