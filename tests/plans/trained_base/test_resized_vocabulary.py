"""A vocabulary that was resized before the training, and of which PEFT saved one embedding, against PEFT's logits."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.tiny_models import edit_config, edit_weights, tiny_llama

from converters import merge, merge_each, prepare_merge
from converters.errors import BaseMismatchError, ConversionError, OptionError
from converters.outputs.lora import as_lora

OLD = 96
EMBEDDING = "model.embed_tokens.weight"


def train(
    tmp_path: Path, new: int, dtype: torch.dtype = torch.float32, tied: bool = False, **settings: object
) -> Path:
    """Save a base, and a LoRA that was trained after its vocabulary was resized."""
    torch.manual_seed(0)
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path / "base")
    model = model.float()
    model.resize_token_embeddings(new)
    defaults = {"target_modules": ["q_proj", "lm_head"], "r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    get_peft_model(model, LoraConfig(**{**defaults, **settings})).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def in_peft(tmp_path: Path, new: int, ids: torch.Tensor, fill: bool = False) -> torch.Tensor:
    """Logits of the unmerged adapter; with `fill`, rows of the input embedding that were not saved are the mean."""
    base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    base.resize_token_embeddings(new)
    with torch.no_grad():
        if fill:
            weight = base.get_input_embeddings().weight
            weight[OLD:] = weight[:OLD].double().mean(dim=0).float()
        return PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits


def merged_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tf.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def test_a_resized_head_is_merged_and_the_other_rows_are_named(tmp_path: Path) -> None:
    adapter = train(tmp_path, 100)
    assert not any("embed_tokens" in name for name in load_file(adapter / "adapter_model.safetensors"))
    tokens = {str(97): {"content": "<tool>"}, str(98): {"content": "</tool>"}}
    (adapter / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    result = merge(tmp_path / "base", adapter, tmp_path / "merged")
    ids = torch.arange(76, 100).reshape(2, 12)
    assert close(merged_logits(tmp_path / "merged", ids), in_peft(tmp_path, 100, ids, fill=True))
    assert merged_logits(tmp_path / "merged", ids).shape[-1] == 100
    warning = next(note for note in result.plan.notes if note.startswith("WARNING"))
    assert f"not those of {EMBEDDING}: rows 96 to 99 of it (token 96, '<tool>', '</tool>', token 99)" in warning
    changed = json.loads((tmp_path / "merged" / "peanut_manifest.json").read_text())["base"][
        "changed_before_training"
    ]
    assert (changed["vocab_size"], changed["rows_set_to_mean"]) == ([96, 100], [EMBEDDING])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 100
    assert f"the new rows of {EMBEDDING}: they are the mean" in (tmp_path / "merged" / "README.md").read_text()


def test_of_a_tied_base_the_saved_rows_are_those_of_the_embedding(tmp_path: Path) -> None:
    adapter = train(tmp_path, 99, tied=True)
    result = merge(tmp_path / "base", adapter, tmp_path / "merged")
    ids = torch.arange(75, 99).reshape(2, 12)
    found = merged_logits(tmp_path / "merged", ids)
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.base_layer.weight"]
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[EMBEDDING], saved)
    assert close(found, in_peft(tmp_path, 99, ids))
    assert not any(note.startswith("WARNING") for note in result.plan.notes)


CASES = {
    "shortened": (80, torch.float32, {}),
    "of a base in bfloat16": (100, torch.bfloat16, {}),
    "embedding": (100, torch.float32, {"target_modules": ["embed_tokens"]}),
    "both": (100, torch.float32, {"target_modules": ["embed_tokens", "lm_head"]}),
    "saved embedding": (100, torch.float32, {"modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_merged_logits_are_those_of_peft(tmp_path: Path, case: str) -> None:
    new, dtype, settings = CASES[case]
    adapter = train(tmp_path, new, dtype, **settings)
    result = merge(tmp_path / "base", adapter, tmp_path / "merged", dtype="fp32")
    ids = torch.arange(24).reshape(2, 12)  # tokens of the base: logits of new ones are compared where they were saved
    found, expected = merged_logits(tmp_path / "merged", ids), in_peft(tmp_path, new, ids)
    warns = any(note.startswith("WARNING") for note in result.plan.notes)
    known = OLD if case == "embedding" else new
    assert close(found[..., :known], expected[..., :known])
    assert warns is (case in ("of a base in bfloat16", "embedding"))


def test_rows_of_another_base_are_refused(tmp_path: Path) -> None:
    adapter = train(tmp_path, 100)
    edit_weights(tmp_path / "base" / "model.safetensors", lambda w: w["lm_head.weight"].add_(1))
    with pytest.raises(BaseMismatchError, match=r"differ from those of .*lm_head.*; give that base$"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")
    with pytest.raises(OptionError, match=r"θ and lm_head.weight, which PEFT saved along.*; give the base"):
        merge("self", adapter, tmp_path / "merged")


@pytest.mark.slow
def test_who_changed_the_rows_gets_another_manifest(tmp_path: Path) -> None:
    """The rows are not in the digest of θ."""
    adapter = train(tmp_path, 100)
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    edit_weights(
        adapter / "adapter_model.safetensors", lambda w: w["base_model.model.lm_head.base_layer.weight"][96:].add_(1)
    )
    result = merge(tmp_path / "base", adapter, tmp_path / "merged", resume=True, overwrite=True)
    assert result.verification is not None, "the earlier output was taken for finished"


def test_other_outputs_say_that_they_cannot(tmp_path: Path) -> None:
    adapter = train(tmp_path, 100)
    with pytest.raises(ConversionError, match="vocabulary was resized from 96 to 100 before the training.*merge it"):
        as_lora(prepare_merge(tmp_path / "base", adapter), tmp_path / "lora")
    second = tmp_path / "second"
    tiny = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    tiny.save_pretrained(second)
    edit_config(second, base_model_name_or_path=None)
    with pytest.raises(OptionError, match="several outputs are made of one base as it is"):
        merge_each(tmp_path / "base", [second, adapter], tmp_path / "outputs")


@pytest.mark.slow
def test_two_vocabularies_have_no_sum(tmp_path: Path) -> None:
    first, second = train(tmp_path / "a", 100), train(tmp_path / "b", 104)
    with pytest.raises(BaseMismatchError, match="trained with a vocabulary of 100, .* with one of 104"):
        prepare_merge(tmp_path / "a" / "base", [first, second])


@pytest.mark.parametrize(
    ("saved", "tied"),
    [
        (["embed_tokens", "lm_head"], True),
        *(
            pytest.param(saved, tied, marks=pytest.mark.slow)
            for saved, tied in ((["embed_tokens", "lm_head"], False), (["embed_tokens"], True), (["lm_head"], False))
        ),
    ],
)
def test_trained_embeddings_that_peft_saves_three_times(saved: list[str], tied: bool, tmp_path: Path) -> None:
    """Where the base on disk has another vocabulary, PEFT adds the original and the copy to `lm_head.weight`."""
    torch.manual_seed(0)
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(100)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    assert any("original_module" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    ids = torch.arange(76, 100).reshape(2, 12)
    assert close(merged_logits(tmp_path / "merged", ids), in_peft(tmp_path, 100, ids))
