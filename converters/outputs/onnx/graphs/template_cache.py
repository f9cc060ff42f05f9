"""A cache of traced graphs on the disk, keyed by everything they depend on: tracing takes seconds."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto

from converters._version import __version__
from converters.outputs.onnx.graphs.reference import Reference
from converters.outputs.onnx.graphs.template import Template, trace

# keys of a config that no graph depends on: the number of labels is set when weights are bound
_INDIFFERENT = (
    "_name_or_path", "dtype", "id2label", "label2id", "num_labels", "problem_type", "torch_dtype",
    "transformers_version",
)  # fmt: skip
_TRACERS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")


def cache_folder() -> Path:
    """Where graphs are kept: among huggingface-hub's assets (HF_ASSETS_CACHE)."""
    from huggingface_hub import cached_assets_path

    return cached_assets_path(library_name="peanut-serve", namespace="onnx")


def cached_graph(facts: Mapping[str, Any], make: Callable[[], ModelProto]) -> ModelProto:
    """A graph from the cache; if it is missing or damaged, it is made and stored.

    Args:
        facts: everything it depends on except the versions of the tracing packages; JSON values.
        make: traces it.
    """
    versions = {"peanut-serve": __version__, **{name: version(name) for name in _TRACERS}}
    key = hashlib.sha256(json.dumps([versions, facts], sort_keys=True).encode()).hexdigest()
    file = cache_folder() / f"{key}.onnx"
    try:
        found = onnx.load(file)
        onnx.checker.check_model(found)
    except (FileNotFoundError, DecodeError, onnx.checker.ValidationError):
        made = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f"{file.name}.{os.getpid()}")
        onnx.save(made, draft)
        draft.replace(file)
        return made
    return found


def graph_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model's config that its graph depends on."""
    return {key: value for key, value in config.items() if key not in _INDIFFERENT}


def traced_template(
    reference: Reference, config: Mapping[str, Any], opset: int, shape: tuple[int, ...] | None
) -> Template:
    """The graph of a model, from the cache, or traced and stored there.

    Raises `ConversionError` when the tracer cannot follow it.
    """
    kind = reference.kind
    facts = {
        "kind": kind.record(),
        "config": graph_config(config),
        "opset": opset,
        "shape": shape,
        "settings": reference.settings,
    }
    return Template(cached_graph(facts, lambda: trace(reference, opset).proto), kind)
