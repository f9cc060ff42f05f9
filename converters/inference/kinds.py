"""The models that can be exported, with the inputs and outputs of their graphs. Imports neither onnx nor torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import ConversionError

_IMAGE = ("pixel_values",)
_TEXT = ("input_ids", "attention_mask")
_TEXT_PAIR = (*_TEXT, "token_type_ids")

# model type -> inputs of its graph; a test exports each type and compares it with torch
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
_DECODERS = ("llama", "qwen2", "gpt2")  # for text generation, without a cache; the others support all other tasks

# suffix of a class name -> (task in the Hub's terms, name of the output)
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
    """The task, inputs and output of a graph.

    Attributes:
        task: in the Hub's terms: `image-classification`, `text-classification`, `token-classification`,
            `text-generation` or `feature-extraction`.
        inputs: `pixel_values` float32 (batch, channels, height, width); or `input_ids`, `attention_mask` and, for
            some models, `token_type_ids`, int64 (batch, sequence).
        output: `logits` (batch, labels), or (batch, sequence, labels) for tokens, or `last_hidden_state`
            (batch, sequence, hidden); float32.
    """

    task: str
    inputs: tuple[str, ...]
    output: str

    @property
    def takes_images(self) -> bool:
        """Whether the input is an image rather than text."""
        return self.inputs == _IMAGE

    @property
    def has_labels(self) -> bool:
        """Whether the last dimension of the output indexes labels."""
        return self.task.endswith("classification")


def find_kind(config: Mapping[str, Any]) -> ModelKind:
    """The kind of the model that a config.json describes.

    Raises `ConversionError`, listing the supported models, if it cannot be exported.
    """
    model_type, name = str(config.get("model_type")), str((config.get("architectures") or ["Model"])[0])
    end = max((end for end in _TASKS if name.endswith(end)), key=len, default=None)
    generates = end is not None and _TASKS[end][0] == "text-generation"
    if model_type not in INPUTS or end is None or generates != (model_type in _DECODERS):
        encoders = ", ".join(known for known in INPUTS if known not in _DECODERS)
        raise ConversionError(
            f"{name} ({model_type}) cannot be exported to ONNX; supported are image, sequence and token classifiers "
            f"and headless models of {encoders}, and causal language models of {', '.join(_DECODERS)}; a merged "
            "checkpoint can be written for every model"
        )
    return ModelKind(_TASKS[end][0], INPUTS[model_type], _TASKS[end][1])
