"""The models of texts that can be exported, by model type."""

from dataclasses import dataclass

_TEXT = ("input_ids", "attention_mask")
_TEXT_PAIR = (*_TEXT, "token_type_ids")


@dataclass(frozen=True)
class TextModel:
    """What is to be known of a model type.

    Attributes:
        inputs: of its graph.
        generates: whether it is a causal language model, without a cache; the others support all other tasks.
        positions_after_pad: whether the first token is at position `pad_token_id + 1` rather than 0.
    """

    inputs: tuple[str, ...] = _TEXT
    generates: bool = False
    positions_after_pad: bool = False


TEXT_MODELS = {
    "bert": TextModel(_TEXT_PAIR),
    "roberta": TextModel(positions_after_pad=True),
    "xlm-roberta": TextModel(positions_after_pad=True),
    "camembert": TextModel(positions_after_pad=True),
    "distilbert": TextModel(),
    "electra": TextModel(_TEXT_PAIR),
    "llama": TextModel(generates=True),
    "qwen2": TextModel(generates=True),
    "gpt2": TextModel(generates=True),
}
