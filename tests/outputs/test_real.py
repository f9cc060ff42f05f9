"""Real pretrained models and really trained adapters."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from sklearn.datasets import load_digits
from support.paths import DATA, JSON_ADAPTER
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTForImageClassification

from converters import merge

QUESTIONS = (
    "What is the capital of Italy?",
    "What color is grass?",
    "Tom has 4 apples and gets 5 more. How many apples does Tom have now?",
    "Who wrote Romeo and Juliet?",
)


@pytest.fixture(scope="module")
def merged_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with the JSON adapter, in float32: bfloat16 rounding would be the loudest difference."""
    output = tmp_path_factory.mktemp("real") / "smollm2-json"
    merge(smollm2, JSON_ADAPTER, output, dtype="fp32")
    return output


def greedy(model: torch.nn.Module, prompt: dict[str, torch.Tensor]) -> list[int]:
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    return tokens[0, prompt["input_ids"].shape[1] :].tolist()


def test_the_merged_language_model_answers_as_the_unmerged_one(smollm2: Path, merged_smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merged_smollm2)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(merged_smollm2, dtype=torch.float32)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        for q in QUESTIONS
    ]
    plain = [greedy(base, prompt) for prompt in prompts]
    unmerged = PeftModel.from_pretrained(base, JSON_ADAPTER).eval()
    for prompt, before in zip(prompts, plain, strict=True):
        found = greedy(merged, prompt)
        assert found == greedy(unmerged, prompt)
        assert found != before
        assert tokenizer.decode(found, skip_special_tokens=True).startswith('{"answer": "')


@pytest.mark.slow  # classifies thousands of images
@pytest.mark.parametrize(
    ("adapter", "labels_of", "accuracy"),
    [("digits5to9", lambda digits: digits[digits >= 5] - 5, 0.88), ("oddeven", lambda digits: digits % 2, 0.9)],
)
def test_merged_image_classifiers_predict_as_trained(
    tmp_path: Path, adapter: str, labels_of: object, accuracy: float
) -> None:
    digits = load_digits()
    kept = digits.target >= 5 if adapter == "digits5to9" else digits.target >= 0
    images = torch.tensor(digits.images[kept], dtype=torch.float32)[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=16, mode="bilinear", align_corners=False)
    wanted = torch.tensor(labels_of(digits.target))
    merge(DATA / "vit-tiny" / "base", DATA / "vit-tiny" / adapter, tmp_path / "merged")
    merged = ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()
    fresh = ViTForImageClassification.from_pretrained(
        DATA / "vit-tiny" / "base", num_labels=merged.num_labels, ignore_mismatched_sizes=True
    )
    unmerged = PeftModel.from_pretrained(fresh, DATA / "vit-tiny" / adapter).eval()
    pixels = (images - 0.5) / 0.5
    with torch.no_grad():
        found, expected = merged(pixels).logits, unmerged(pixels).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert (found.argmax(1) == wanted).double().mean() >= accuracy
