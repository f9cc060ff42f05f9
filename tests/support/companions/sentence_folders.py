"""Folders of sentence-transformers for the tests, and what their pooling is by the formulas of its documentation."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

EVERY_POOLING = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def pooling_modes(names: Sequence[str]) -> dict[str, object]:
    """The settings of a pooling."""
    return {f"pooling_mode_{name}": name in names for name in EVERY_POOLING}


def write_modules(
    folder: Path, pooling: dict[str, object], *more: str, max_length: int, prompt: str | None = None
) -> None:
    """What sentence-transformers puts beside a model."""
    folder.mkdir(exist_ok=True)
    kinds = ["Transformer", "Pooling", *more]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    named = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(named))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    settings = {"max_seq_length": max_length, "do_lower_case": True}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    prompts = {"prompts": {"query": "Bad "}, "default_prompt_name": prompt}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))


def pooled(hidden: np.ndarray, names: Sequence[str], normalised: bool) -> np.ndarray:
    """The embedding of one text, of the hidden states of its tokens."""
    count = len(hidden)
    weights = np.arange(1, count + 1)[:, None]
    known = {
        "cls_token": hidden[0],
        "max_tokens": hidden.max(0),
        "mean_tokens": hidden.mean(0),
        "mean_sqrt_len_tokens": hidden.sum(0) / np.sqrt(count),
        "weightedmean_tokens": (hidden * weights).sum(0) / weights.sum(),
        "lasttoken": hidden[-1],
    }
    found = np.concatenate([known[name] for name in names])
    return found / np.linalg.norm(found) if normalised else found
