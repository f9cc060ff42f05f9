"""What the tokenizer of an output knows: its tokens by id, and its pad token."""

import json
from collections.abc import Mapping
from typing import Any

from converters.models.companions.companion import Companions


def read_tokens(companions: Companions) -> dict[int, str]:
    """Id -> token, of the files that say it in plain text; a vocabulary of sentencepiece's own is not read."""
    tokens: dict[int, str] = {}
    whole = _json(companions, "tokenizer.json")
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else _json(companions, "vocab.json")
    if isinstance(vocabulary, dict):
        tokens |= {token: text for text, token in vocabulary.items() if isinstance(token, int)}
    elif isinstance(vocabulary, list):  # of a unigram model: [text, score] each
        tokens |= {
            token: str(entry[0]) for token, entry in enumerate(vocabulary) if isinstance(entry, list) and entry
        }
    if not tokens and "vocab.txt" in companions.files:
        lines = companions.files["vocab.txt"].read().decode("utf-8", "replace").splitlines()
        tokens |= dict(enumerate(lines))
    added = whole.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            tokens[entry["id"]] = str(entry.get("content"))
    return tokens | _added(companions)


def _added(companions: Companions) -> dict[int, str]:
    """The tokens that were added to a vocabulary later."""
    tokens = {token: text for text, token in _json(companions, "added_tokens.json").items() if isinstance(token, int)}
    decoder = _json(companions, "tokenizer_config.json").get("added_tokens_decoder")
    for token, entry in decoder.items() if isinstance(decoder, dict) else ():
        if token.isdecimal() and isinstance(entry, dict):
            tokens[int(token)] = str(entry.get("content"))
    return tokens


def pad_token(companions: Companions) -> str | None:
    """The pad token that the tokenizer states."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        found = _json(companions, name).get("pad_token")
        text = found.get("content") if isinstance(found, Mapping) else found
        if isinstance(text, str):
            return text
    return None


def _json(companions: Companions, name: str) -> dict[str, Any]:
    if name not in companions.files:
        return {}
    try:
        value = json.loads(companions.files[name].read())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
