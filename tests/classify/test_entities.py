"""Token classifiers find the same labelled parts of a text as the pipeline of transformers."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import Run
from support.tiny_models import Pair, save_adapter
from transformers import AutoTokenizer, BertConfig, BertForTokenClassification, pipeline

from converters import export_onnx, merge
from converters.errors import CheckpointError, OptionError
from peanut_serve.classify.engine import OnnxEngine
from peanut_serve.classify.entities import find_entities

SEED = 2  # for weights that give every label to some token
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]
TEXTS = [
    "Angela Merkel met Antonín Dvořák's great-grandson in Saint Petersburg, not in St. Petersburg (Florida).",
    "  Unbelievably long whitespace\t\tand a newline\nbetween Reykjavík and Llanfairpwllgwyngyll ",
    "日本の首都は東京です。",
    "[red]x[/red] 🥜🥜 peanuts!",
    "a",
    "Paris Paris Paris Paris Paris",
    "The quick brown fox jumps over the lazy dog, and Professor Quirrell of Hogwarts looks on.",
    "3.14159 and 2.71828 are numbers; e-mail me at someone@example.org",
    "ANGELA MERKEL",
]


@pytest.fixture(scope="module")
def exported(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A small BERT with random weights and a real vocabulary; its export, next to its merged checkpoint."""
    folder = tmp_path_factory.mktemp("entities")
    pair = Pair(folder / "base", folder / "adapter", folder / "onnx")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(**sizes, vocab_size=30522, initializer_range=0.3, num_labels=len(LABELS))
    config.id2label = dict(enumerate(LABELS))
    torch.manual_seed(SEED)
    model = BertForTokenClassification(config)
    model.save_pretrained(pair.base)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (minilm / name).exists():
            shutil.copy(minilm / name, pair.base / name)
    save_adapter(model, pair.adapter, target_modules=["query", "value"], modules_to_save=["classifier"])
    export_onnx(pair.base, pair.adapter, pair.output, labels=LABELS)
    merge(pair.base, pair.adapter, folder / "merged", labels=LABELS)
    return pair


def test_entities_are_those_of_transformers(exported: Pair) -> None:
    merged = exported.output.with_name("merged")
    theirs = pipeline(
        "token-classification",
        model=BertForTokenClassification.from_pretrained(merged),
        tokenizer=AutoTokenizer.from_pretrained(merged),
        aggregation_strategy="simple",
    )
    found = OnnxEngine(exported.output).entities(TEXTS)
    for text, ours in zip(TEXTS, found, strict=True):
        wanted = theirs(text)
        assert [(one.label, one.start, one.end) for one in ours] == [
            (one["entity_group"], one["start"], one["end"]) for one in wanted
        ]
        assert [one.score for one in ours] == pytest.approx([float(one["score"]) for one in wanted], abs=1e-4)
        assert [one.text for one in ours] == [text[one.start : one.end] for one in ours]
    assert {one.label for ours in found for one in ours} == {"PER", "LOC", "MISC"}
    neighbours = [pair for ours in found for pair in pairwise(ours)]
    assert any(" " in one.text for ours in found for one in ours)  # of several tokens
    assert any(one.label == other.label and other.start - one.end < 2 for one, other in neighbours)  # B- after it


def logits_of(*labels: str) -> np.ndarray:
    """Logits with probability 0.9 for these labels, and equal ones for all others."""
    probabilities = np.full((len(labels), len(LABELS)), 0.1 / (len(LABELS) - 1))
    probabilities[range(len(labels)), [LABELS.index(label) for label in labels]] = 0.9
    return np.log(probabilities).astype(np.float32)


def test_where_entities_begin_and_end() -> None:
    text = "a b c d e f g"
    spans = [None, *((2 * i, 2 * i + 1) for i in range(7)), None]
    logits = logits_of("B-PER", "B-PER", "I-PER", "B-PER", "I-LOC", "O", "MISC", "MISC", "B-LOC", "B-LOC")
    found = find_entities(text, logits, spans, LABELS)  # its last row is padding
    assert [(one.text, one.label, one.start, one.end) for one in found] == [
        ("a b", "PER", 0, 3),  # begins and continues; [CLS] before it is not part of it
        ("c", "PER", 4, 5),  # a new one begins
        ("d", "LOC", 6, 7),
        ("f g", "MISC", 10, 13),
    ]
    assert all(one.score == pytest.approx(0.9) for one in found)
    assert find_entities("", logits_of("O"), [None], LABELS) == []


def test_a_text_that_is_too_long(exported: Pair) -> None:
    engine = OnnxEngine(exported.output)
    engine.entities(["x " * 510])
    with pytest.raises(OptionError, match=r"^the text 'x x .* has 513 tokens, and the model takes 512; split it"):
        engine.entities(["x " * 511])


def test_a_tokenizer_without_positions_of_tokens(exported: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OnnxEngine(exported.output)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    with pytest.raises(CheckpointError, match="does not report the positions of tokens"):
        engine.entities(["Paris"])


def test_the_command(exported: Pair, run_here: Run) -> None:
    (wanted,) = OnnxEngine(exported.output).entities([TEXTS[3]])
    done = run_here("peanut-serve", "predict", exported.output, TEXTS[3], "--json")
    assert json.loads(done.stdout) == [{"input": TEXTS[3], "entities": [vars(one) for one in wanted]}]
    shown = run_here("peanut-serve", "predict", exported.output, TEXTS[3], "\t.").stdout
    assert TEXTS[3] in shown  # and not interpreted as markup
    assert all(f"{one.score:.4f}" in shown and one.text in shown for one in wanted)
