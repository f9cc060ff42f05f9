"""Exported models of texts: answers, embeddings, next tokens, and classifiers that cannot find padding."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.commands import Run
from support.companions.preprocessor_folders import WORDS, text_model
from support.companions.sentence_folders import EVERY_POOLING, pooled, pooling_modes, write_modules
from support.tiny_models import save_adapter, tiny_llama, unmerged
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from converters.api.exporting import export_onnx
from converters.errors import ConversionError, OptionError
from peanut_serve.classify.engine import OnnxEngine

pytestmark = pytest.mark.slow  # traces models

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
BERT = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 24}
TEXTS = ["good film", "bad", "good good bad film bad film"]
PAIRS = [("good", "bad film film"), ("bad film", "good"), ("film", "bad good film good bad bad")]


def exported(model: PreTrainedModel, folder: Path, pad: str | None = "[PAD]", **settings: object) -> Any:
    """Export a model with an adapter to `folder/onnx`; returns PEFT's unmerged model. `pad` is the tokenizer's."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    model.save_pretrained(folder / "base")
    text_model(folder / "base", pad=pad, eos="<end>")
    save_adapter(model, folder / "adapter", **settings)
    export_onnx(folder / "base", folder / "adapter", folder / "onnx")
    return unmerged(type(model), folder / "base", folder / "adapter")


def test_answers_are_the_best_parts_of_a_text(tmp_path: Path, run_here: Run) -> None:
    heads = {"target_modules": ["query", "value"], "modules_to_save": ["qa_outputs"]}
    oracle = exported(BertForQuestionAnswering(BertConfig(**BERT)), tmp_path, **heads)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    found = OnnxEngine(tmp_path / "onnx").answers(PAIRS, top_k=2)
    for (question, text), answers in zip(PAIRS, found, strict=True):
        encoded = tokenizer([question], [text], return_tensors="pt", return_token_type_ids=True)
        with torch.inference_mode():
            logits = oracle(**encoded)
        own = [i for i, number in enumerate(encoded.sequence_ids(0)) if number == 1]
        words = text.split()
        assert len(own) == len(words)
        first, last = (logits[name][0, own].softmax(0) for name in ("start_logits", "end_logits"))
        wanted = {(i, j): float(first[i] * last[j]) for i in range(len(words)) for j in range(i, len(words))}
        best = sorted(wanted, key=lambda where: -wanted[where])[:2]
        assert [one.text for one in answers] == [" ".join(words[i : j + 1]) for i, j in best]
        assert [one.score for one in answers] == pytest.approx([wanted[where] for where in best], rel=1e-4)
        assert all(text[one.start : one.end] == one.text for one in answers)
    done = run_here("peanut-serve", "predict", tmp_path / "onnx", *PAIRS[0], "--pairs", "--json", "--top-k", "1")
    assert json.loads(done.stdout)[0]["answers"][0]["text"] == found[0][0].text
    for given, said in ((PAIRS[0], "give --pairs"), (("good", "bad", "film", "--pairs"), "an even number of texts")):
        done = run_here("peanut-serve", "predict", tmp_path / "onnx", *given)
        assert done.returncode == 1
        assert said in done.stderr


@pytest.mark.parametrize("normalised", [False, True])
def test_embeddings_of_sentence_transformers(tmp_path: Path, run_here: Run, normalised: bool) -> None:
    """Each text by itself, without padding, by the formulas of the documentation."""
    modes = ("mean_tokens",) if normalised else EVERY_POOLING
    more, prompt = (["Normalize"], "query") if normalised else ([], None)
    write_modules(tmp_path / "base", pooling_modes(modes), *more, max_length=6, prompt=prompt)
    oracle = exported(BertModel(BertConfig(**BERT)), tmp_path, target_modules=["query", "value"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    found = OnnxEngine(tmp_path / "onnx").embeddings([TEXTS[0].upper(), *TEXTS[1:]])
    for text, embedding in zip(TEXTS, found, strict=True):
        whole = f"bad {text}" if normalised else text
        encoded = tokenizer([whole], return_tensors="pt", truncation=True, max_length=6)
        with torch.inference_mode():
            hidden = oracle(**encoded).last_hidden_state[0].numpy()
        np.testing.assert_allclose(embedding, pooled(hidden, modes, normalised), rtol=1e-4, atol=1e-5)
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    assert [value.name for value in model.graph.output] == ["sentence_embedding"]
    done = run_here("peanut-serve", "predict", tmp_path / "onnx", TEXTS[1], "--json")
    assert json.loads(done.stdout)[0]["embedding"] == pytest.approx(found[1].tolist())


@pytest.mark.parametrize(
    ("pooling", "more", "said"),
    [
        ({"pooling_mode_mean_tokens": True}, ("Dense",), "its modules are Transformer, Pooling, Dense; only"),
        ({"pooling_mode": "attention"}, (), "the pooling is attention, expected of cls, max, mean"),
        ({"pooling_mode_median": True}, (), "the setting pooling_mode_median is unknown"),
        ({"pooling_mode": "mean", "include_prompt": False}, (), "the prompt 'Bad ' is left out of the pooling"),
    ],
)
def test_other_modules_are_refused(
    tmp_path: Path, pooling: dict[str, object], more: tuple[str, ...], said: str
) -> None:
    write_modules(tmp_path / "base", pooling, *more, max_length=6, prompt="query")
    with pytest.raises(ConversionError, match=said):
        exported(BertModel(BertConfig(**BERT)), tmp_path, target_modules=["query", "value"])


@pytest.mark.parametrize("pad", [None, -1])
def test_a_decoder_without_a_pad_token_reads_the_last_column(tmp_path: Path, pad: int | None) -> None:
    config = LlamaConfig(**{**BERT, "num_key_value_heads": 2}, num_labels=3, pad_token_id=pad)
    oracle = exported(LlamaForSequenceClassification(config), tmp_path, pad=None, modules_to_save=["score"])
    engine = OnnxEngine(tmp_path / "onnx")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")

    def wanted(texts: list[str]) -> np.ndarray:
        encoded = tokenizer(texts, return_tensors="pt")
        with torch.inference_mode():
            return oracle(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits.numpy()

    for text, found in zip(TEXTS, engine.predict(TEXTS, top_k=3), strict=True):
        chances = torch.from_numpy(wanted([text])[0]).softmax(0).tolist()
        assert {one.label: one.score for one in found} == pytest.approx(
            {f"LABEL_{i}": chance for i, chance in enumerate(chances)}, rel=1e-4
        )
    two = tokenizer(["good film", "bad film"], return_tensors="np")
    arrays = {name: two[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    if pad is None:
        with pytest.raises(OptionError, match="cannot run on"):
            engine.run(arrays)
    else:
        np.testing.assert_allclose(engine.run(arrays), wanted(["good film", "bad film"]), rtol=1e-4, atol=1e-5)


def test_the_next_token(tmp_path: Path, run_here: Run) -> None:
    oracle = exported(tiny_llama(vocab_size=len(WORDS)), tmp_path)
    assert isinstance(oracle.base_model.model, LlamaForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    for text, found in zip(TEXTS, OnnxEngine(tmp_path / "onnx").next_tokens(TEXTS, top_k=2), strict=True):
        ids = tokenizer([text], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            chances, best = oracle(input_ids=ids).logits[0, -1].softmax(0).topk(2)
        assert [one.label for one in found] == [WORDS[i] for i in best.tolist()]
        assert [one.score for one in found] == pytest.approx(chances.tolist(), rel=1e-4)
    done = run_here("peanut-serve", "predict", tmp_path / "onnx", TEXTS[0])
    assert done.returncode == 0, done.stderr
    assert "label" in done.stdout
