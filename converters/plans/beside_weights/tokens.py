"""Whether tokenizer and model agree: a row of the embedding for every token, and a pad token for a classifier."""

from collections.abc import Mapping
from typing import Any

from converters.models import config as model_config
from converters.models.architecture import ends_by_pad_token
from converters.models.companions.companion import Companions
from converters.models.companions.vocabulary import pad_token, read_tokens

_CLASSIFIER = "ForSequenceClassification"
# names of the input embedding in the models of transformers; a model may have more rows than its config says
_EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight", "shared.weight")
_SHOWN = 5


def settle_pad_token(config: Mapping[str, Any], companions: Companions) -> tuple[Mapping[str, Any], list[str]]:
    """The config with the tokenizer's pad token, where a classifier needs one and has none; and notes.

    A classifier on a decoder reads its answer at the last token before the padding. Without a pad token transformers
    and PEFT refuse batches of several texts, or read the answer at the padding.
    """
    names, kind = config.get("architectures"), config.get("model_type")
    is_classifier = isinstance(names, list) and bool(names) and str(names[0]).endswith(_CLASSIFIER)
    if not is_classifier or model_config.pad_token_of(config) is not None:
        return config, []
    # a config that says null or -1 has none, whatever the default of its class is
    if not ends_by_pad_token(str(kind), by_default="pad_token_id" not in config):
        return config, []
    text = pad_token(companions)
    ids = {token: number for number, token in read_tokens(companions).items()} if text is not None else {}
    found = ids.get(text) if text is not None else None
    rows = _vocab_size(config)
    if found is None or (rows is not None and found >= rows):
        what = (
            "the tokenizer has none either"
            if text is None
            else f"the tokenizer's {text!r} has no row in the embedding"
        )
        return config, [
            f"the config has no pad_token_id, and {what}: this classifier takes one text at a time; set pad_token_id "
            "in config.json for batches"
        ]
    return model_config.with_pad_token(config, found), [
        f"pad_token_id: {found} ({text!r}), from the tokenizer; the config has none"
    ]


def token_notes(shapes: Mapping[str, tuple[int, ...]], companions: Companions) -> list[str]:
    """A note about the tokens of the tokenizer that the embedding has no row for; `shapes` are of the output."""
    rows = max((shape[0] for name, shape in shapes.items() if name.endswith(_EMBEDDINGS)), default=None)
    if rows is None:  # a model of images or sounds, whose tokenizer writes its answers
        return []
    tokens = read_tokens(companions)
    if not (beyond := sorted(token for token in tokens if token >= rows)):
        return []
    shown = ", ".join(f"{token} {tokens[token]!r}" for token in beyond[:_SHOWN])
    more = f" and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
    return [
        f"the embedding has {rows} rows, but the tokenizer has tokens beyond them: {shown}{more}; a text with one of "
        "them fails: save the resized embedding with the adapter, or do not use them"
    ]


def _vocab_size(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    for one in (config, text if isinstance(text, dict) else {}):
        if isinstance(one.get("vocab_size"), int):
            return int(one["vocab_size"])
    return None
