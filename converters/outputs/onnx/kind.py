"""The kind of graph of a planned task."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from converters.errors import ConversionError
from converters.inference.examples import full_config
from converters.inference.kinds import ModelKind, find_kind
from converters.inference.sentences import MODULES, read_sentences
from converters.inference.text_models import TEXT_MODELS
from converters.plans.merge import Plan

# their frequencies depend on the length of the text, by a branch that a trace takes once and for all
_BRANCHING_ROPES = ("dynamic", "longrope")


def kind_of(plan: Plan) -> ModelKind:
    """The inputs and outputs of the graph of a plan.

    Raises `ConversionError`, listing the supported models, if it cannot be exported.
    """
    kind = find_kind(plan.config)
    if kind.takes_files:
        return kind
    model = full_config(plan.base.folder, plan.config)
    for found in _rope_types(getattr(model, "rope_parameters", None)):
        if found in _BRANCHING_ROPES:
            raise ConversionError(
                f"{plan.base.name}: its positions are of the type {found}, which depends on the length of each text; "
                "an ONNX graph is traced for one; a merged checkpoint can be written"
            )
    if kind.task == "text-classification" and TEXT_MODELS[model.model_type].decodes:
        # without a pad token transformers refuses batches; with a negative one it reads the last column
        pad_id = model.pad_token_id
        return replace(kind, finds_end=pad_id is not None and pad_id >= 0, single=pad_id is None)
    if kind.task == "feature-extraction":
        own = plan.head.path
        sentences = read_sentences(own if (own / MODULES).is_file() else plan.base.folder)
        if sentences is not None:
            return replace(kind, task="sentence-similarity", outputs=("sentence_embedding",), sentences=sentences)
    return kind


def _rope_types(parameters: Mapping[str, Any] | None) -> Iterator[str]:
    """The types of rotary embeddings; some models have one for each type of layer."""
    for key, value in (parameters or {}).items():
        if key in ("rope_type", "type"):
            yield str(value)
        elif isinstance(value, Mapping):
            yield from _rope_types(value)
