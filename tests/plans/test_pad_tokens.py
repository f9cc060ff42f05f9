"""Tokenizer and model agree: a pad token for classifiers on decoders, a row of the embedding for every token."""

import json
from collections.abc import Callable

import pytest
import torch
from support.companions.tiny_tokenizers import WORDS, tiny_tokenizer
from support.tiny_models import Pair, edit_json, unmerged
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from converters import merge, prepare_merge

MakePair = Callable[..., Pair]


def classifier() -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=8, num_labels=3,
        )
    )  # fmt: skip


@pytest.mark.parametrize("stated", ["absent", None, -1])
def test_a_classifier_gets_the_pad_token_of_its_tokenizer(make_pair: MakePair, stated: object) -> None:
    pair = make_pair(classifier(), task_type="SEQ_CLS")
    path = pair.base / "config.json"
    config = json.loads(path.read_text())
    config.pop("pad_token_id", None)
    path.write_text(json.dumps(config if stated == "absent" else {**config, "pad_token_id": stated}))
    tiny_tokenizer(pad_token="<pad>").save_pretrained(pair.adapter)
    result = merge(pair.base, pair.adapter, pair.output)
    assert "pad_token_id: 1 ('<pad>'), from the tokenizer; the config has none" in result.plan.notes
    texts = ["hello world hello", "world"]
    padded = AutoTokenizer.from_pretrained(pair.output)(texts, padding=True, return_tensors="pt")
    merged = LlamaForSequenceClassification.from_pretrained(pair.output).eval()
    oracle = unmerged(LlamaForSequenceClassification, pair.base, pair.adapter)
    with torch.no_grad():
        together = merged(padded["input_ids"], attention_mask=padded["attention_mask"]).logits
        alone = [oracle(torch.tensor([row])).logits for row in ([3, 4, 3], [4])]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)


def test_a_classifier_without_any_pad_token_gets_a_note(make_pair: MakePair) -> None:
    pair = make_pair(classifier(), task_type="SEQ_CLS")
    notes = prepare_merge(pair.base, pair.adapter).notes
    assert [note for note in notes if "no pad_token_id, and the tokenizer has none either" in note]
    edit_json(pair.base / "config.json", pad_token_id=7)
    plan = prepare_merge(pair.base, pair.adapter)
    assert plan.config["pad_token_id"] == 7
    assert not [note for note in plan.notes if "pad_token_id" in note]


def tokens_beyond(pair: Pair) -> list[str]:
    return [note for note in prepare_merge(pair.base, pair.adapter).notes if "tokens beyond" in note]


def test_tokens_without_a_row_are_named(pair: Pair) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(pair.adapter)
    assert tokens_beyond(pair) == []
    words = tuple(f"w{number}" for number in range(95 - len(WORDS)))
    more = tiny_tokenizer(words=(*WORDS, *words))
    more.add_tokens(["last"])  # 95: the last row
    more.save_pretrained(pair.adapter)
    assert tokens_beyond(pair) == []
    more.add_special_tokens({"pad_token": "[PAD]"})
    more.save_pretrained(pair.adapter)
    (note,) = tokens_beyond(pair)
    assert note.startswith("the embedding has 96 rows, but the tokenizer has tokens beyond them: 96 '[PAD]'; ")


def test_a_language_model_keeps_its_config(pair: Pair) -> None:
    tiny_tokenizer(pad_token="<pad>").save_pretrained(pair.adapter)
    assert prepare_merge(pair.base, pair.adapter).config.get("pad_token_id") is None
