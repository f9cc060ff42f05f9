"""The models that can be exported, with the inputs and outputs of their graphs. Imports neither onnx nor torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from converters.errors import ConversionError
from converters.inference.media_models import MEDIA_MODELS, is_wave
from converters.inference.sentences import Sentences
from converters.inference.text_models import TEXT_MODELS, TOKEN_TYPES

# model type -> inputs of its graph; a test exports each type and compares it with torch
INPUTS = {
    **{name: model.inputs for name, model in MEDIA_MODELS.items()},
    **{name: model.inputs for name, model in TEXT_MODELS.items()},
}
_DECODERS = tuple(name for name, model in TEXT_MODELS.items() if model.decodes)

# suffix of a class name -> (task in the Hub's terms, names of the outputs); of models of texts
_TASKS = {
    "ForSequenceClassification": ("text-classification", ("logits",)),
    "ForTokenClassification": ("token-classification", ("logits",)),
    "ForQuestionAnswering": ("question-answering", ("start_logits", "end_logits")),
    "ForCausalLM": ("text-generation", ("logits",)),
    "LMHeadModel": ("text-generation", ("logits",)),
    "Model": ("feature-extraction", ("last_hidden_state",)),
}

_BATCH = 8


@dataclass(frozen=True)
class ModelKind:
    """The task, inputs and outputs of a graph.

    Attributes:
        task: in the Hub's terms: `image-classification`, `audio-classification`, `text-classification`,
            `token-classification`, `question-answering`, `text-generation`, `feature-extraction`,
            `image-feature-extraction` or `sentence-similarity`.
        inputs: `pixel_values` float32 (batch, channels, height, width); `input_values` float32 (batch, samples), or
            (batch, time, mel) of AST; `input_features` float32 (batch, mel, time) of Whisper; or `input_ids`,
            `attention_mask` and, for some models, `token_type_ids`, int64 (batch, sequence).
        outputs: `logits` (batch, labels), or (batch, sequence, labels) for tokens; `start_logits` and `end_logits`
            (batch, sequence); `last_hidden_state` (batch, sequence, hidden), `image_embeds` or `sentence_embedding`
            (batch, width); float32.
        finds_end: whether the graph finds the last token of a padded text, which a classifier on a decoder reads.
            Otherwise it reads the last column, so texts must not be padded.
        single: whether the graph takes one text at a time.
        sentences: how texts become embeddings, of a model of sentence-transformers.
        takes_waves: whether the input is the samples of a sound, of any length. Padding would change the outputs.
    """

    task: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    finds_end: bool = True
    single: bool = False
    sentences: Sentences | None = None
    takes_waves: bool = False

    @property
    def batch_size(self) -> int:
        """How many examples are run together: one, where padding to the longest would change the outputs."""
        return 1 if self.takes_waves or self.single or not self.finds_end else _BATCH

    @property
    def takes_files(self) -> bool:
        """Whether an input is a file, an image or a sound, rather than a text."""
        return "input_ids" not in self.inputs

    @property
    def has_labels(self) -> bool:
        """Whether the last dimension of the output indexes labels."""
        return self.task.endswith("classification")

    def record(self) -> dict[str, Any]:
        """For the config of an export: JSON values, which `from_record` reads."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "ModelKind":
        """What `record` gave. Raises `TypeError` for unknown or missing fields."""
        fields = _with_tuples(record)
        if fields.get("sentences") is not None:
            fields["sentences"] = Sentences(**_with_tuples(fields["sentences"]))
        return cls(**fields)


def _with_tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}


def find_kind(config: Mapping[str, Any]) -> ModelKind:
    """The kind of the model that a config.json describes.

    Raises `ConversionError`, listing the supported models, if it cannot be exported.
    """
    model_type, name = str(config.get("model_type")), str((config.get("architectures") or ["Model"])[0])
    tasks = MEDIA_MODELS[model_type].tasks if model_type in MEDIA_MODELS else _TASKS
    end = max((end for end in tasks if name.endswith(end)), key=len, default=None)
    generates = end is not None and tasks[end][0] == "text-generation"
    if model_type not in INPUTS or end is None or (generates and model_type not in _DECODERS):
        raise ConversionError(
            f"{name} ({model_type}) cannot be exported to ONNX; supported are classifiers, question answering and "
            f"headless models of {', '.join(INPUTS)}, and causal language models of {', '.join(_DECODERS)}; a merged "
            "checkpoint can be written for every model"
        )
    task, outputs = tasks[end]
    inputs = INPUTS[model_type]
    if model_type in TEXT_MODELS and TEXT_MODELS[model_type].optional_types and config.get("type_vocab_size", 0) > 1:
        inputs = (*inputs, TOKEN_TYPES)
    return ModelKind(task, inputs, outputs, takes_waves=is_wave(model_type))
