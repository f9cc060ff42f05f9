"""Which names stand for one repository, and which for copies of one model."""

import pytest

from converters.hub.twins import are_twins, cached_repository, is_quantized, repository, unquantized

TWINS = [
    ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B"),
    ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B-Instruct"),
    ("unsloth/Qwen2.5-7B-Instruct-unsloth-bnb-4bit", "Qwen/Qwen2.5-7B-Instruct"),
    ("unsloth/Qwen2.5-7B-Instruct-unsloth-bnb-4bit", "unsloth/Qwen2.5-7B-Instruct"),
    ("unsloth/mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3"),
    ("unsloth/gpt-oss-20b-BF16", "openai/gpt-oss-20b"),
    ("TheBloke/Llama-2-7B-GPTQ", "meta-llama/Llama-2-7b-hf"),
    ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
    ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", "meta-llama/Llama-3.1-8B-Instruct"),
    ("neuralmagic/Llama-2-7b-chat-quantized.w4a16", "meta-llama/Llama-2-7b-chat-hf"),
    ("mlx-community/Llama-3.2-1B-4bit", "meta-llama/Llama-3.2-1B"),
    ("someone/Falcon3-1B-AWQ", "tiiuae/Falcon3-1B"),
]
OTHERS = [
    ("alice/Llama-3.2-1B", "bob/Llama-3.2-1B"),  # a fine-tuned version may keep the name
    ("unsloth/Llama-3.2-1B-bnb-4bit", "meta-llama/Llama-3.2-1B-Instruct"),
    ("unsloth/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"),
    ("unsloth/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"),
    ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3"),
    ("gpt2", "alice/gpt2"),
]


@pytest.mark.parametrize(("first", "second"), TWINS)
def test_twins(first: str, second: str) -> None:
    assert are_twins(first, second)
    assert are_twins(second, first)
    assert repository(first) != repository(second)


@pytest.mark.parametrize(("first", "second"), OTHERS)
def test_other_models(first: str, second: str) -> None:
    assert not are_twins(first, second)
    assert not are_twins(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("roberta-base", "FacebookAI/roberta-base"),
        ("google-bert/bert-base-uncased", "bert-base-uncased"),
        ("llama2-7b", "meta-llama/Llama-2-7b-hf"),
        ("meta-llama/llama-3.2-1b", "meta-llama/Llama-3.2-1B"),
    ],
)
def test_spellings_of_one_repository(first: str, second: str) -> None:
    assert repository(first) == repository(second)


def test_names_of_quantized_models() -> None:
    assert unquantized("unsloth/Qwen3-8B-unsloth-bnb-4bit") == "unsloth/Qwen3-8B"
    assert unquantized("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4") == "Qwen/Qwen2.5-7B-Instruct"
    for name in ("unsloth/Qwen3-8B", "org/gpt-4bitter", "org/Qwen3-8B-Q", "org/wide-dynamic"):
        assert not is_quantized(name)
        assert unquantized(name) == name


def test_folders_of_the_cache() -> None:
    folder = f"/home/me/.cache/huggingface/hub/models--org--a-model/snapshots/{'0' * 40}"
    assert cached_repository(folder) == cached_repository(f"{folder}/") == ("org/a-model", "0" * 40)
    assert cached_repository("/models/org/a-model/snapshots/main") is None
