"""The models that can be exported, with the inputs and outputs of their graphs. Imports neither onnx nor torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import ConversionError
from converters.inference.media_models import MEDIA_MODELS
from converters.inference.text_models import TEXT_MODELS

# model type -> inputs of its graph; a test exports each type and compares it with torch
INPUTS = {**MEDIA_MODELS, **{name: model.inputs for name, model in TEXT_MODELS.items()}}
_DECODERS = tuple(name for name, model in TEXT_MODELS.items() if model.generates)

# suffix of a class name -> (task in the Hub's terms, names of the outputs)
_TASKS = {
    "ForImageClassification": ("image-classification", ("logits",)),
    "ForImageClassificationWithTeacher": ("image-classification", ("logits",)),
    "ForSequenceClassification": ("text-classification", ("logits",)),
    "ForTokenClassification": ("token-classification", ("logits",)),
    "ForQuestionAnswering": ("question-answering", ("start_logits", "end_logits")),
    "ForCausalLM": ("text-generation", ("logits",)),
    "LMHeadModel": ("text-generation", ("logits",)),
    "Model": ("feature-extraction", ("last_hidden_state",)),
}


@dataclass(frozen=True)
class ModelKind:
    """The task, inputs and outputs of a graph.

    Attributes:
        task: in the Hub's terms: `image-classification`, `text-classification`, `token-classification`,
            `question-answering`, `text-generation` or `feature-extraction`.
        inputs: `pixel_values` float32 (batch, channels, height, width); or `input_ids`, `attention_mask` and, for
            some models, `token_type_ids`, int64 (batch, sequence).
        outputs: `logits` (batch, labels), or (batch, sequence, labels) for tokens; `start_logits` and `end_logits`
            (batch, sequence); or `last_hidden_state` (batch, sequence, hidden); float32.
    """

    task: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def takes_files(self) -> bool:
        """Whether an input is a file, such as an image, rather than a text."""
        return "input_ids" not in self.inputs

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
            f"{name} ({model_type}) cannot be exported to ONNX; supported are image, sequence and token classifiers, "
            f"question answering and headless models of {encoders}, and causal language models of "
            f"{', '.join(_DECODERS)}; a merged checkpoint can be written for every model"
        )
    task, outputs = _TASKS[end]
    return ModelKind(task, INPUTS[model_type], outputs)
