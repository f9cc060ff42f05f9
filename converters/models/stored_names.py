"""A base whose class transformers does not know: the names and shapes of its checkpoint stand for its class.

What adapts or replaces tensors by the names that the checkpoint has needs no model code. Everything else does, and
code that comes with a checkpoint (`auto_map`) is never run.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from converters.errors import UnknownModelError
from converters.models.architecture import AUTO_CLASSES, Architecture, build_architecture
from converters.models.checkpoint import Checkpoint
from converters.models.config import label_count
from converters.models.plain_decoders import plain_decoder

_EMBEDDING = re.compile(r"emb|wte|wpe", re.IGNORECASE)
_VOCABULARY = re.compile(r"emb|wte|lm_head|(^|\.)output", re.IGNORECASE)

Shapes = Mapping[str, tuple[int, ...]]


def architecture_of(base: Checkpoint, config: Mapping[str, Any], replaced: Shapes) -> Architecture:
    """The class that a merged config names; its stored names, if transformers does not know the model type.

    Args:
        base: the base.
        config: of the merged model.
        replaced: tensors of the merged model that are not the base's.

    Raises `TargetError` if transformers cannot build the class.
    """
    names = config.get("architectures") or [None]
    try:
        return plain_decoder(base, config, names[0]) or build_architecture(config, names[0])
    except UnknownModelError:
        return _stand_in(str(names[0] or config.get("model_type")), base, config, replaced)


def stored_architecture(
    base: Checkpoint, head: Shapes, task_type: str | None, unknown: UnknownModelError
) -> tuple[Architecture, list[str]]:
    """The stored names of a base as its class, with notes for the user.

    Args:
        base: the base.
        head: tensors that an adapter replaces.
        task_type: that it was trained for.
        unknown: why the class cannot be built.

    Raises `UnknownModelError` if the class of the merged model, or the number of its labels, is not clear.
    """
    new = {name: shape for name, shape in head.items() if name not in base.tensors}
    name = base.architecture if not new else _class_for(base.config, task_type)
    if name is None:
        what = f"which class has {next(iter(new))}" if new else "the class of the base"
        raise UnknownModelError(
            f"{unknown}; neither do its config's architectures and auto_map say {what}: name it there"
        )
    notes = [
        f"transformers cannot build {name} ({base.config.get('model_type')}) without remote code: the names of the "
        "adapter are those of the base's files, and no code was needed"
    ]
    if new:
        notes.append(
            f"architecture: {name}, by the base's auto_map, with the adapter's head; whether this class needs "
            "tensors that neither base nor adapter has was not checked, since remote code is not run"
        )
    config = {**base.config, "num_labels": _count_labels(new, unknown)} if new else base.config
    return _stand_in(name, base, config, new), notes


def refuse_other_names(
    base: Checkpoint, updated: Collection[str], replaced: Shapes, unknown: UnknownModelError
) -> None:
    """Raise `UnknownModelError` unless the base's files have all updated tensors, and nothing changed may be tied."""
    missing = [name for name in updated if name not in base.tensors]
    if missing:
        raise UnknownModelError(f"{unknown}; the base has no {missing[0]}") from None
    if base.config.get("tie_word_embeddings") is False:
        return
    size = base.config.get("vocab_size")
    rows = {name: shape[0] for name, shape in replaced.items() if shape}
    rows |= {name: info.shape[0] for name, info in base.tensors.items() if info.shape}
    for name in (*updated, *replaced):
        outside = re.search(r"\.\d+\.", name) is None
        if outside and _VOCABULARY.search(name) and size in (None, rows.get(name)):
            raise UnknownModelError(
                f"{unknown}; the adapter changes {name}, and only that code says whether it is tied to another: "
                'if it is not, write "tie_word_embeddings": false into the base\'s config.json'
            ) from None


def _stand_in(name: str, base: Checkpoint, config: Mapping[str, Any], others: Shapes) -> Architecture:
    old, size = base.config.get("vocab_size"), config.get("vocab_size")
    shapes = {}
    for stored, info in base.tensors.items():
        resized = size != old and len(info.shape) > 1 and info.shape[0] == old
        shapes[stored] = (int(size or 0), *info.shape[1:]) if resized else info.shape
    linear = (n.removesuffix(".weight") for n, shape in shapes.items() if n.endswith(".weight") and len(shape) == 2)
    return Architecture(
        name=name,
        shapes={**shapes, **others},
        linear=frozenset(module for module in linear if not _EMBEDDING.search(module)),
        tied={},
        prefix="",
        num_labels=label_count(config),
        vocab_size=size if isinstance(size, int) else None,
        transposed=frozenset(),
        obstacles={},
        settings={},
        embeddings=(),
        _rename=lambda stored: (stored, None),
        _optional=(),
        _converters=(),
    )


def _class_for(config: Mapping[str, Any], task_type: str | None) -> str | None:
    """The class with a head for a task, as the config's auto_map names it."""
    auto_map = config.get("auto_map")
    found = auto_map.get(AUTO_CLASSES.get(task_type or "")) if isinstance(auto_map, dict) else None
    return str(found).rsplit(".", 1)[-1] if isinstance(found, str) else None


def _count_labels(head: Shapes, unknown: UnknownModelError) -> int:
    """The outputs of a new head: rows that are not the input of another of its layers."""
    matrices = [shape for shape in head.values() if len(shape) == 2]
    found = {rows for rows, _ in matrices} - {width for _, width in matrices}
    if len(found) != 1:
        raise UnknownModelError(f"{unknown}; how many labels the adapter's head has is not clear without it")
    return found.pop()
