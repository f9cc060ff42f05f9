"""The models of texts that can be exported, by model type."""

from dataclasses import dataclass

TEXT = ("input_ids", "attention_mask")
TOKEN_TYPES = "token_type_ids"
_TEXT_PAIR = (*TEXT, TOKEN_TYPES)


@dataclass(frozen=True)
class TextModel:
    """What is to be known of a model type.

    Attributes:
        inputs: of its graph.
        decodes: whether a token sees only those before it. Such a model generates text, here without a cache.
        positions_after_pad: whether the first token is at position `pad_token_id + 1` rather than 0.
        optional_types: whether it takes token types if its config has a `type_vocab_size` above 1.
    """

    inputs: tuple[str, ...] = TEXT
    decodes: bool = False
    positions_after_pad: bool = False
    optional_types: bool = False


_TYPED = TextModel(_TEXT_PAIR)
_AFTER_PAD = TextModel(positions_after_pad=True)
_DECODER = TextModel(decodes=True)

# a test exports each type and compares it with torch
TEXT_MODELS = {
    "bert": _TYPED,
    "roberta": _AFTER_PAD,
    "xlm-roberta": _AFTER_PAD,
    "xlm-roberta-xl": _AFTER_PAD,
    "camembert": _AFTER_PAD,
    "distilbert": TextModel(),
    "electra": _TYPED,
    "albert": _TYPED,
    "mpnet": _AFTER_PAD,
    "deberta": TextModel(optional_types=True),
    "deberta-v2": TextModel(optional_types=True),
    "modernbert": TextModel(),
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gemma": _DECODER,
    "gemma2": _DECODER,
    "gemma3_text": _DECODER,
    "phi3": _DECODER,
    "gpt2": _DECODER,
}
