"""Preprocessing of texts with a model's tokenizer. Nothing is downloaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import CheckpointError, OptionError
from converters.inference.examples import Example, brief, full_config
from converters.inference.kinds import ModelKind
from converters.inference.sentences import Sentences
from converters.inference.text_models import TEXT_MODELS

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model")


class TextPreprocessor:
    """Turns texts and pairs of texts into int64 (batch, longest), truncated to the model's limit and right-padded.

    Sequences are padded on the right regardless of the tokenizer's setting, because GPT-2 counts positions from the
    first column. They are padded with the `pad_token_id` of the config if it has one: a classifier on a decoder uses
    it to find the last token, and RoBERTa to compute positions.

    Args:
        folder: the folder of a model with a tokenizer.
        kind: the kind of graph, which determines the inputs.
        config: the config.json of the model.

    Attributes:
        max_length: the maximum number of tokens in a sequence, including special tokens.
        pad_id: the id that pads `input_ids`; the other inputs are padded with 0.

    Raises `CheckpointError` if the tokenizer is missing or unusable, or if there is no token to pad with.
    """

    def __init__(self, folder: Path, kind: ModelKind, config: Mapping[str, Any]) -> None:
        self._folder, self._names = folder, kind.inputs
        model = full_config(folder, config)
        self._tokenizer = _load_tokenizer(folder)
        self._vocab_size: int = model.vocab_size
        positions = model.max_position_embeddings
        if TEXT_MODELS[model.model_type].positions_after_pad:
            positions -= model.pad_token_id + 1
        self._sentences = kind.sentences or Sentences(())
        limits = (self._tokenizer.model_max_length, positions, self._sentences.max_length)
        self.max_length = int(min(limit for limit in limits if limit is not None))
        known = (model.pad_token_id, self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        pad_id = next((one for one in known if one is not None and 0 <= one < self._vocab_size), None)
        if pad_id is None:
            raise CheckpointError(
                f"{folder}: no token to pad texts with; expected a pad_token_id in config.json, or a pad_token or "
                "eos_token of the tokenizer"
            )
        self.pad_id: int = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        """The arrays of texts.

        Raises:
            OptionError: an example is a file or has no tokens.
            CheckpointError: the model has no embedding for a token.
        """
        rows = [self._encode(example) for example in examples]
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        arrays = {name: np.full(shape, self.pad_id if name == "input_ids" else 0, np.int64) for name in self._names}
        for i, row in enumerate(rows):
            for name, array in arrays.items():
                array[i, : len(row[name])] = row[name]
        largest = arrays["input_ids"].max()
        if largest >= self._vocab_size:
            raise CheckpointError(
                f"{self._folder}: the tokenizer produced the token id {largest}, but the model has only "
                f"{self._vocab_size} tokens; expected the tokenizer the model was trained with"
            )
        return arrays

    def spans(self, text: str | tuple[str, str]) -> list[tuple[int, int] | None]:
        """The (start, end) of each token of a row in its text, of a pair in the second; None for all other tokens.

        Raises:
            OptionError: the text is longer than the model's limit.
            CheckpointError: the tokenizer does not report the positions of tokens.
        """
        if not self._tokenizer.is_fast:
            raise CheckpointError(
                f"{self._folder}: the tokenizer does not report the positions of tokens; use one with tokenizer.json"
            )
        texts = [[one] for one in (text if isinstance(text, tuple) else (text,))]
        found = self._tokenizer(*texts, return_offsets_mapping=True, return_special_tokens_mask=True)
        places, special = found["offset_mapping"][0], found["special_tokens_mask"][0]
        if len(places) > self.max_length:
            raise OptionError(
                f"the text {brief(repr(text))} has {len(places)} tokens, and the model takes {self.max_length}; "
                "split it: the rest would be ignored"
            )
        of_text = [number == len(texts) - 1 for number in found.sequence_ids(0)]
        return [
            tuple(place) if own and not mask else None
            for place, mask, own in zip(places, special, of_text, strict=True)
        ]

    def token(self, index: int) -> str:
        """The text of a token."""
        text: str = self._tokenizer.decode([index])
        return text

    def _encode(self, example: Example) -> Mapping[str, list[int]]:
        if isinstance(example, Path | bytes):
            what = "this is the content of a file" if isinstance(example, bytes) else f"{example} is a file"
            raise OptionError(f"{what}, expected a text: the model takes texts")
        # as lists: transformers 5.19 does not treat a single text with an empty second text as a pair
        texts = [[self._prepared(text)] for text in (example if isinstance(example, tuple) else (example,))]
        wanted = {
            f"return_{name}": True for name in self._names if name != "input_ids"
        }  # by default the tokenizer does not return all of them
        found = self._tokenizer(*texts, truncation=True, max_length=self.max_length, **wanted)
        if not found["input_ids"][0]:
            raise OptionError(f"the text {brief(repr(texts[0][0]))} has no tokens, expected at least one")
        return {name: found[name][0] for name in self._names}

    def _prepared(self, text: str) -> str:
        """As sentence-transformers does it; other texts are as they are."""
        whole = self._sentences.prompt + text
        return whole.lower() if self._sentences.lowercase else whole


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # without a vocabulary transformers silently creates a tokenizer that knows no words
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(f"{folder}: no tokenizer; expected one of {', '.join(_VOCABULARIES)}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise CheckpointError(f"{folder}: the tokenizer cannot be used ({brief(error)})") from None
