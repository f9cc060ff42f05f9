"""Preprocessing of texts, compared with ids worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.companions.preprocessor_folders import (
    BAD,
    CLS,
    END,
    FILM,
    GOOD,
    PAD,
    SEP,
    UNK,
    WORDS,
    refusal,
    text_model,
    texts_of,
    write,
)

from converters.errors import CheckpointError, OptionError


def test_texts_are_padded_to_the_longest(tmp_path: Path):
    found = texts_of("bert", text_model(tmp_path))(["good film", "bad", "a good bad film"])
    wanted = {
        "input_ids": [
            [CLS, GOOD, FILM, SEP, PAD, PAD],
            [CLS, BAD, SEP, PAD, PAD, PAD],
            [CLS, UNK, GOOD, BAD, FILM, SEP],
        ],
        "attention_mask": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
        "token_type_ids": [[0] * 6] * 3,
    }
    assert {name: array.tolist() for name, array in found.items()} == wanted
    assert {array.dtype for array in found.values()} == {np.dtype(np.int64)}


def test_pairs_have_types_of_their_tokens(tmp_path: Path):
    found = texts_of("bert", text_model(tmp_path))([("good", "bad film"), ("bad", "")])
    assert found["input_ids"].tolist() == [[CLS, GOOD, SEP, BAD, FILM, SEP], [CLS, BAD, SEP, SEP, PAD, PAD]]
    assert found["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0]]
    assert found["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]


def test_a_graph_gets_its_inputs_and_no_others(tmp_path: Path):
    model = text_model(tmp_path, model_input_names=["input_ids"])  # what the tokenizer returns by default
    found = texts_of("distilbert", model)(["good"])
    assert {name: array.tolist() for name, array in found.items()} == {
        "input_ids": [[CLS, GOOD, SEP]],
        "attention_mask": [[1, 1, 1]],
    }


@pytest.mark.parametrize(
    ("model_type", "config", "options", "wanted"),
    [
        ("bert", {"max_position_embeddings": 5}, {}, 5),
        ("bert", {"max_position_embeddings": 9}, {"model_max_length": 4}, 4),
        ("bert", {"max_position_embeddings": 4}, {"model_max_length": 9}, 4),
        ("bert", {}, {}, 512),  # BERT's default
        ("gpt2", {"n_positions": 6}, {}, 6),
        ("roberta", {"max_position_embeddings": 7}, {}, 5),
        ("xlm-roberta", {"max_position_embeddings": 7}, {}, 5),
        ("camembert", {"max_position_embeddings": 7, "pad_token_id": 0}, {}, 6),
    ],
)
def test_texts_are_truncated_to_the_limit_of_the_model(
    tmp_path: Path, model_type: str, config: dict, options: dict, wanted: int
):
    preprocess = texts_of(model_type, text_model(tmp_path, **options), **config)
    assert preprocess.max_length == wanted
    ids = preprocess(["film " * 600])["input_ids"]
    assert ids.tolist() == [[CLS, *[FILM] * (wanted - 2), SEP]]


def test_the_longer_text_of_a_pair_is_truncated(tmp_path: Path):
    preprocess = texts_of("bert", text_model(tmp_path), max_position_embeddings=8)
    found = preprocess([("good bad", "film film film film film film")])
    assert found["input_ids"].tolist() == [[CLS, GOOD, BAD, SEP, FILM, FILM, FILM, SEP]]


@pytest.mark.parametrize(
    ("config", "tokens", "wanted"),
    [
        ({"pad_token_id": FILM}, {"pad": "[PAD]", "eos": "<end>"}, FILM),
        ({}, {"pad": "[UNK]", "eos": "<end>"}, UNK),
        ({}, {"pad": None, "eos": "<end>"}, END),
        ({"pad_token_id": -1}, {"pad": "[UNK]"}, UNK),
        ({"pad_token_id": len(WORDS)}, {"pad": "[UNK]"}, UNK),
    ],
)
def test_the_pad_token_is_the_one_the_model_finds_the_end_by(tmp_path: Path, config: dict, tokens: dict, wanted: int):
    preprocess = texts_of("gpt2", text_model(tmp_path, template=False, **tokens), **config)
    assert preprocess.pad_id == wanted
    found = preprocess(["good film", "bad"])
    assert found["input_ids"].tolist() == [[GOOD, FILM], [BAD, wanted]]
    assert found["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_padding_is_on_the_right_whatever_the_tokenizer_says(tmp_path: Path):
    preprocess = texts_of("gpt2", text_model(tmp_path, template=False, eos="<end>", padding_side="left"))
    found = preprocess(["bad", "good film"])
    assert found["input_ids"].tolist() == [[BAD, PAD], [GOOD, FILM]]
    assert found["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_a_model_without_a_pad_token_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError) as error:
        texts_of("gpt2", text_model(tmp_path, template=False, pad=None))
    assert refusal(error) == (
        f"{tmp_path}: no token to pad texts with; expected a pad_token_id in config.json, or a pad_token or "
        "eos_token of the tokenizer"
    )


def test_a_missing_or_broken_tokenizer_is_refused(tmp_path: Path):
    write(tmp_path / "config.json", json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError) as error:
        texts_of("bert", tmp_path)
    assert refusal(error).startswith(f"{tmp_path}: no tokenizer; expected one of tokenizer.json, vocab.txt, ")
    write(text_model(tmp_path) / "tokenizer.json", "{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be used") as error:
        texts_of("bert", tmp_path)
    refusal(error)


def test_a_text_without_tokens_is_refused(tmp_path: Path):
    preprocess = texts_of("gpt2", text_model(tmp_path, template=False))
    with pytest.raises(OptionError) as error:
        preprocess(["good", " "])
    assert refusal(error) == "the text ' ' has no tokens, expected at least one"


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
    preprocess = texts_of("bert", text_model(tmp_path), vocab_size=FILM)
    preprocess(["good bad"])
    with pytest.raises(CheckpointError) as error:
        preprocess(["good bad", "film"])
    assert refusal(error) == (
        f"{tmp_path}: the tokenizer produced the token id 6, but the model has only 6 tokens; "
        "expected the tokenizer the model was trained with"
    )
