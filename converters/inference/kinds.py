"""Which models can be exported, and what their graphs take and give. Imports neither onnx nor torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import ConversionError

_IMAGE = ("pixel_values",)
_TEXT = ("input_ids", "attention_mask")
_TEXT_PAIR = (*_TEXT, "token_type_ids")

# model type -> inputs of its graph; every one is exported by a test and held against torch
INPUTS = {
    "vit": _IMAGE,
    "deit": _IMAGE,
    "dinov2": _IMAGE,
    "dinov2_with_registers": _IMAGE,
    "swin": _IMAGE,
    "beit": _IMAGE,
    "bert": _TEXT_PAIR,
    "roberta": _TEXT,
    "xlm-roberta": _TEXT,
    "camembert": _TEXT,
    "distilbert": _TEXT,
    "electra": _TEXT_PAIR,
    "llama": _TEXT,
    "qwen2": _TEXT,
    "gpt2": _TEXT,
}
_DECODERS = ("llama", "qwen2", "gpt2")  # they generate, without a cache; the others do everything else

# end of a class name -> (task as the Hub calls it, the output)
_TASKS = {
    "ForImageClassification": ("image-classification", "logits"),
    "ForImageClassificationWithTeacher": ("image-classification", "logits"),
    "ForSequenceClassification": ("text-classification", "logits"),
    "ForTokenClassification": ("token-classification", "logits"),
    "ForCausalLM": ("text-generation", "logits"),
    "LMHeadModel": ("text-generation", "logits"),
    "Model": ("feature-extraction", "last_hidden_state"),
}


@dataclass(frozen=True)
class ModelKind:
    """What a graph computes.

    Attributes:
        task: as the Hub calls it: `image-classification`, `text-classification`, `token-classification`,
            `text-generation` or `feature-extraction`.
        inputs: `pixel_values` float32 (batch, channels, height, width); or `input_ids`, `attention_mask` and perhaps
            `token_type_ids`, int64 (batch, sequence).
        output: `logits` (batch, labels), of tokens (batch, sequence, labels), or `last_hidden_state`
            (batch, sequence, hidden); float32.
    """

    task: str
    inputs: tuple[str, ...]
    output: str

    @property
    def takes_images(self) -> bool:
        """Whether the input is an image; else it is text."""
        return self.inputs == _IMAGE

    @property
    def has_labels(self) -> bool:
        """Whether the last dimension of the output is one of labels."""
        return self.task.endswith("classification")


def find_kind(config: Mapping[str, Any]) -> ModelKind:
    """The kind of the model a config.json describes.

    Raises `ConversionError`, naming those that work, if it cannot be exported.
    """
    model_type, name = str(config.get("model_type")), str((config.get("architectures") or ["Model"])[0])
    end = max((end for end in _TASKS if name.endswith(end)), key=len, default=None)
    generates = end is not None and _TASKS[end][0] == "text-generation"
    if model_type not in INPUTS or end is None or generates != (model_type in _DECODERS):
        encoders = ", ".join(known for known in INPUTS if known not in _DECODERS)
        raise ConversionError(
            f"{name} ({model_type}) cannot be exported to ONNX; what works are image, sequence and token classifiers "
            f"and headless models of {encoders}, and causal language models of {', '.join(_DECODERS)}; a merged "
            "checkpoint can be written of every model"
        )
    return ModelKind(_TASKS[end][0], INPUTS[model_type], _TASKS[end][1])
