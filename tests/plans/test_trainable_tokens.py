"""Trainable tokens, alone and beside LoRA, against HF PEFT's unmerged model: rows of embeddings, tied heads."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from peft import PeftConfig
from safetensors.torch import load_file
from support.commands import Run
from support.peft_methods import MODELS, close, logits, reloaded, train
from support.tiny_models import edit_json, edit_weights

from converters import load_adapter, merge, prepare_merge
from converters.errors import ConversionError, PeanutError
from converters.outputs.lora import plan_lora_adapter

TOKENS = [13, 3, 7]
TARGETS = {"llama": ["q_proj"], "gpt2": ["c_attn"]}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte"}
LM = {"task_type": "CAUSAL_LM"}


def alone(model: str, **settings: object) -> PeftConfig:
    return peft.TrainableTokensConfig(token_indices=TOKENS, **LM, **settings)


def beside_lora(model: str, **settings: object) -> PeftConfig:
    given = {"trainable_token_indices": TOKENS, "target_modules": TARGETS[model], **settings}
    return peft.LoraConfig(r=4, **LM, **given)


def of_both(model: str) -> PeftConfig:
    return beside_lora(model, trainable_token_indices={EMBEDDING[model]: TOKENS, "lm_head": TOKENS})


def of_each(model: str) -> PeftConfig:
    return beside_lora(model, trainable_token_indices={EMBEDDING[model]: TOKENS, "lm_head": [1, 13]})


def of_the_head(model: str) -> PeftConfig:
    return beside_lora(model, trainable_token_indices={"lm_head": TOKENS})


def of_two_modules(model: str) -> PeftConfig:
    return alone(model, target_modules=[EMBEDDING[model], "lm_head"])


CONFIGS = {one.__name__: one for one in (alone, beside_lora, of_both, of_each, of_the_head, of_two_modules)}


def language_model(name: str, tied: bool) -> tf.PreTrainedModel:
    if name == "llama":
        return MODELS["llama"](tie_word_embeddings=tied)
    config = MODELS["gpt2"]().config
    config.tie_word_embeddings = tied
    return tf.GPT2LMHeadModel(config)


def trained(
    config: Callable[[str], PeftConfig], model: str, tied: bool, folder: Path, seed: int = 1
) -> tuple[Path, Path]:
    base, adapter = folder / f"base-{seed}", folder / f"adapter-{seed}"
    train(language_model(model, tied), config(model), base, adapter, seed)
    return base, adapter


# PEFT's own forward pass fails for two modules that are tied
NAMES_AND_TIES = [
    (name, tied) for name in CONFIGS for tied in (False, True) if (name, tied) != ("of_two_modules", True)
]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize(("name", "tied"), NAMES_AND_TIES)
def test_merged_logits_are_those_of_peft(name: str, model: str, tied: bool, tmp_path: Path) -> None:
    base, adapter = trained(CONFIGS[name], model, tied, tmp_path)
    plain = language_model(model, tied)
    wanted = logits(reloaded(plain, base, adapter))
    result = merge(base, adapter, tmp_path / "merged")
    assert result.verification is not None
    assert result.verification.max_ulp <= 0.5 + 2**-10
    merged = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert close(logits(merged), wanted)
    assert not close(logits(type(plain).from_pretrained(base, dtype=torch.float32).eval()), wanted)
    keeps = tied and name not in ("of_each", "of_the_head")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is keeps
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) is not keeps


def test_the_rows_are_those_that_were_trained(tmp_path: Path) -> None:
    """Bit for bit, and no other row of the embedding."""
    base, adapter = trained(beside_lora, "llama", True, tmp_path)
    merge(base, adapter, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    rows = load_file(adapter / "adapter_model.safetensors")[
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    wanted = before["model.embed_tokens.weight"].clone()
    wanted[TOKENS] = rows
    assert torch.equal(after["model.embed_tokens.weight"], wanted)


def test_sums_resume_verification_and_digests(tmp_path: Path, run_here: Run) -> None:
    """Each difference from the base, times its weight; a tied head has the same."""
    base, one = trained(alone, "llama", True, tmp_path)
    _, two = trained(
        lambda model: beside_lora(model, trainable_token_indices=[3, 90]), "llama", True, tmp_path, seed=2
    )
    both = ["--adapter", f"{one}=0.5", "--adapter", f"{two}=-2"]
    for output, options in (("sum", ()), ("resumed", ("--resume",))):
        done = run_here("peanut-merge", "--base", base, *both, "-o", tmp_path / output, *options)
        assert done.returncode == 0, done.stderr
    files = [tmp_path / output / "model.safetensors" for output in ("sum", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    done = run_here("peanut-inspect", tmp_path / "sum", "--verify", "--full", "--base", base, *both)
    assert done.returncode == 0, done.stderr
    assert "lm_head.weight" not in load_file(files[0])
    w0 = load_file(base / "model.safetensors")["model.embed_tokens.weight"].double()
    wanted = w0.clone()
    for path, weight in ((one, 0.5), (two, -2.0)):
        opened = load_adapter(path)
        tokens = opened.modules["model.embed_tokens"].settings["token_indices"]
        wanted[tokens] += weight * (opened.method("model.embed_tokens").parts["rows"].double() - w0[tokens])
    assert torch.allclose(load_file(files[0])["model.embed_tokens.weight"].double(), wanted, rtol=1e-6, atol=1e-7)
    facts = json.loads(run_here("peanut-inspect", one, "--base", base, "--json").stdout)
    assert (facts["method"], facts["tokens"]) == ("trainable-tokens", 3)
    edit_weights(files[0], lambda weights: weights["model.embed_tokens.weight"][7].add_(1e-3))
    done = run_here("peanut-inspect", tmp_path / "sum", "--verify", "--full", "--base", base, *both)
    assert done.returncode == 1
    digest = load_adapter(one).digest
    edit_json(one / "adapter_config.json", token_indices=[13, 3, 8])
    assert load_adapter(one).digest != digest


def test_a_sum_that_unties_gives_the_head_its_tokens(tmp_path: Path) -> None:
    """LoRA on a tied head unties it; tokens of another adapter change both tensors."""
    base, tokens = trained(alone, "llama", True, tmp_path)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], **LM)
    train(language_model("llama", True), config, tmp_path / "base-2", tmp_path / "lora", 2)
    edit = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert edit["target_modules"] == ["lm_head"]
    edit_weights(
        tmp_path / "lora" / "adapter_model.safetensors",
        lambda weights: {key: value for key, value in weights.items() if "base_layer" not in key},
    )
    merge(base, [tokens, tmp_path / "lora"], tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    w0 = load_file(base / "model.safetensors")["model.embed_tokens.weight"].double()
    embedding = w0.clone()
    embedding[TOKENS] = load_adapter(tokens).method("model.embed_tokens").parts["rows"].double()
    lora = load_adapter(tmp_path / "lora").tweaker("lm_head")
    head = embedding + lora.scaling * lora.b.double() @ lora.a.double()
    assert torch.allclose(after["model.embed_tokens.weight"].double(), embedding, rtol=1e-6, atol=1e-7)
    assert torch.allclose(after["lm_head.weight"].double(), head, rtol=1e-5, atol=1e-6)
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


def refused(
    config: Callable[[str], PeftConfig], folder: Path, match: str, change: object = None, **fields: object
) -> None:
    base, adapter = trained(config, "llama", True, folder)
    if change is not None:
        edit_weights(adapter / "adapter_model.safetensors", change)
    edit_json(adapter / "adapter_config.json", **fields)
    with pytest.raises(PeanutError, match=match):
        merge(base, adapter, folder / "merged")


def other_head(weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.lm_head.trainable_tokens_delta"] += 1


def without_embedding(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in weights.items() if "embed_tokens" not in key}


def test_refusals(tmp_path: Path) -> None:
    field = "trainable_token_indices"
    refused(
        alone, tmp_path / "1", "token 96 was trained, the vocabulary of the base has 96", token_indices=[96, 1, 2]
    )
    refused(alone, tmp_path / "2", r"token_indices = \[-1, 1, 2\]; expected a list", token_indices=[-1, 1, 2])
    refused(alone, tmp_path / "3", "token_indices has 1 twice", token_indices=[1, 2, 1])
    refused(alone, tmp_path / "4", "rows for 3 tokens, the config names 2", token_indices=[1, 2])
    refused(alone, tmp_path / "5", "the weights adapt lm_head, the config's", other_head)
    refused(beside_lora, tmp_path / "6", "only trainable_token_indices of the config says which", **{field: None})
    refused(beside_lora, tmp_path / "7", "names wte, the weights have trained tokens of", **{field: {"wte": [1]}})
    lost = {"embed_tokens": TOKENS, "lm_head": [1]}
    refused(beside_lora, tmp_path / "8", "no trained tokens of lm_head, which", **{field: lost})
    refused(of_each, tmp_path / "9", "no trained tokens of embed_tokens", without_embedding)
    refused(beside_lora, tmp_path / "10", "of none; the adapter is incomplete", without_embedding)
    base, adapter = trained(beside_lora, "llama", False, tmp_path / "11")
    with pytest.raises(ConversionError, match="replaces rows of the embedding .trainable tokens.*merge it"):
        plan_lora_adapter(prepare_merge(base, load_adapter(adapter)), tmp_path / "lora")
    both = lambda model: beside_lora(model, target_modules=["lm_head"])  # noqa: E731
    refused(both, tmp_path / "12", "trains tokens of .*embed_tokens and adapts lm_head, which is tied to it")


@pytest.mark.parametrize("config", [alone, beside_lora])
def test_a_resized_vocabulary_comes_with_the_adapter(config: Callable[[str], PeftConfig], tmp_path: Path) -> None:
    """PEFT saves the embedding that it trained on along: the base may be the resized one, or the one before."""
    model = language_model("llama", True)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
    model.resize_token_embeddings(100)
    settings = {"token_indices": [97, 3]} if config is alone else {"trainable_token_indices": [97, 3]}
    given = config("llama")
    for name, value in settings.items():
        setattr(given, name, value)
    train(model, given, tmp_path / "resized", tmp_path / "adapter")
    wanted = logits(reloaded(model, tmp_path / "resized", tmp_path / "adapter"))
    for base in ("base", "resized"):
        output = tmp_path / f"merged-{base}"
        merge(tmp_path / base, tmp_path / "adapter", output)
        assert close(logits(type(model).from_pretrained(output).eval()), wanted)
        assert json.loads((output / "config.json").read_text())["tie_word_embeddings"]


def test_a_state_dict_in_memory_is_the_same_adapter(tmp_path: Path) -> None:
    """`torch.save(model.state_dict())` keeps the name of the adapter, the weights of the base and the rows before."""
    adapted = train(language_model("llama", False), beside_lora("llama"), tmp_path / "base", tmp_path / "adapter")
    folder = tmp_path / "whole"
    folder.mkdir()
    torch.save(adapted.state_dict(), folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text((tmp_path / "adapter" / "adapter_config.json").read_text())
    whole, saved = load_adapter(folder), load_adapter(tmp_path / "adapter")
    assert whole.digest == saved.digest
    assert whole.embedded
    merge(tmp_path / "base", folder, tmp_path / "merged")
