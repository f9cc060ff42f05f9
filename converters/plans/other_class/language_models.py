"""Adapters of a language model by itself on a multimodal base that contains it, and the other way round.

A Gemma 3 is trained as `Gemma3ForCausalLM` (`model.layers`) or inside `Gemma3ForConditionalGeneration`
(`model.language_model.layers`, and `language_model.model.layers` before transformers 4.52); the layers are the same.
Names are mapped here only if every one of the adapter has exactly one counterpart. Whether θ fits the weights is
checked like that of every adapter, by its shapes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from converters.adapters.adapter import Adapter, Weighted
from converters.errors import TargetError
from converters.models.architecture import HEAD_TASKS
from converters.models.checkpoint import Checkpoint
from converters.plans.targets import refuse_untrained, untrained_modules

_WRAPPERS = ("language_model", "text_model")  # what models of several modalities call their language model
_TOWERS = ("vision_config", "audio_config")
_HEAD = "lm_head.weight"
_IN_LAYER = re.compile(r"\.\d+\.")


def map_language_model(base: Checkpoint, weighted: Weighted) -> tuple[Weighted, str | None]:
    """The adapter with the names that the base's files have, and a note, if it is of the base's language model alone.

    Without a note, the adapter is as it was.

    Raises:
        TargetError: a name has several counterparts, or none.
        ThetaError: a module of the language model that should have θ has none.
    """
    adapter = weighted.adapter
    names = [f"{module}.weight" for module in adapter.modules] + list(adapter.saved)
    if not names or adapter.target_parameters or (adapter.targeting is not None and adapter.targeting.replaces):
        return weighted, None
    is_wrapped = any(_is_wrapped(name) for name in names)
    multimodal = any(isinstance(base.config.get(tower), dict) for tower in _TOWERS)
    if is_wrapped == multimodal or (is_wrapped and all(name in base.tensors for name in names)):
        return weighted, None
    stored = _language_model(base, multimodal)
    heads = {name for name in adapter.saved if _is_head(name, adapter, stored, base)}
    inside = [name for name in names if name not in heads]
    if multimodal and (adapter.model_class == base.architecture or not _is_alone(inside, stored, base)):
        return weighted, None
    table = {name: name if name in heads else _counterpart(name, stored, base, adapter) for name in names}
    _refuse_incomplete(adapter, stored, base, names)
    table |= {name: stored.get(_inner(name), [name])[0] for name in adapter.embedded}
    own, here = ("a multimodal model", "its language model") if is_wrapped else ("a language model", "one around it")
    example = next((f": {name} is {table[name]}, and so on" for name in names if table[name] != name), "")
    return replace(weighted, adapter=with_names(adapter, table)), (
        f"by its names, {adapter.name} was trained on {own}, and the base is {here}; names and shapes of all that it "
        f"adapts are those of the base{example}"
    )


def with_names(adapter: Adapter, table: Mapping[str, str]) -> Adapter:
    """The adapter under other names. What its config says about names is to be checked before.

    Args:
        adapter: the adapter.
        table: tensor that it updates, replaces or contains -> its name in the base's files.
    """
    return replace(
        adapter,
        modules={table[f"{m}.weight"].removesuffix(".weight"): theta for m, theta in adapter.modules.items()},
        saved={table[name]: key for name, key in adapter.saved.items()},
        embedded={table.get(name, name): key for name, key in adapter.embedded.items()},
        targeting=None,
        model_class=None,
    )


def _is_wrapped(name: str) -> bool:
    return any(part in _WRAPPERS for part in name.split(".")[:3])


def _is_head(name: str, adapter: Adapter, stored: Mapping[str, list[str]], base: Checkpoint) -> bool:
    """Whether it is of a classifier's head, which has the same name in both classes, and which the base lacks."""
    is_outermost = name.count(".") == 1 and _inner(name) not in stored and name not in base.tensors
    return is_outermost and adapter.task_type in HEAD_TASKS


def _inner(name: str) -> str:
    """The name inside the language model: `layers.0.mlp.up_proj.weight`, `embed_tokens.weight`, `lm_head.weight`."""
    parts = name.split(".")
    for wrapper in _WRAPPERS:
        if wrapper in parts[:3]:
            parts.remove(wrapper)
            break
    while parts[0] == "model":
        parts = parts[1:]
    return ".".join(parts)


def _language_model(base: Checkpoint, multimodal: bool) -> dict[str, list[str]]:
    """Name inside the language model -> the tensors of the base that it may be."""
    wrapped = [name for name in base.tensors if _is_wrapped(name)] if multimodal else []
    names: Iterable[str] = base.tensors
    if wrapped:
        names = [*wrapped, *(name for name in base.tensors if name.startswith("lm_head."))]
    elif multimodal:  # Qwen2-VL: `model.layers` beside `visual.blocks`
        names = [name for name in base.tensors if name.startswith(("model.", "lm_head."))]
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_inner(name), []).append(name)
    return found


def _is_alone(names: Iterable[str], stored: Mapping[str, list[str]], base: Checkpoint) -> bool:
    """Whether all names are of the language model, and none could as well be of another part of the base."""
    inside = {name for found in stored.values() for name in found}
    elsewhere: dict[str, list[str]] = {}
    for name in base.tensors.keys() - inside:
        parts = name.split(".")
        for start in range(len(parts)):
            elsewhere.setdefault(".".join(parts[start:]), []).append(name)
    for name in names:
        if name == _HEAD:
            continue
        found = stored.get(_inner(name), [])
        shapes = {base.tensors[one].shape for one in found}
        if not found or any(base.tensors[other].shape in shapes for other in elsewhere.get(name, ())):
            return False
    return True


def _counterpart(name: str, stored: Mapping[str, list[str]], base: Checkpoint, adapter: Adapter) -> str:
    found = stored.get(_inner(name), [_HEAD] if _inner(name) == _HEAD else [])  # it may be tied, and not be stored
    if len(found) == 1:
        return found[0]
    if not found:
        raise TargetError(
            f"{adapter.path} was trained on a multimodal model, and the base {base.name} is a language model without "
            f"{name}; give the base with all modalities"
        )
    raise TargetError(
        f"{adapter.path}: {name} could be {found[0]} or {found[1]} of the base; rename its keys to those of the base"
    )


def _refuse_incomplete(
    adapter: Adapter, stored: Mapping[str, list[str]], base: Checkpoint, names: Sequence[str]
) -> None:
    """Raise `ThetaError` if a layer of the language model should have θ by the adapter's config, and has none.

    The layers are spelled as the adapter spells its own, since its config may name them by a pattern.
    """
    adapted = {_inner(name): name for name in names}
    prefixes = {name.removesuffix(inner) for inner, name in adapted.items() if _IN_LAYER.search(inner)}
    others = [
        prefix + inner.removesuffix(".weight")
        for inner, found in stored.items()
        if inner not in adapted and inner.endswith(".weight") and _IN_LAYER.search(inner)
        if len(base.tensors[found[0]].shape) == 2
        for prefix in sorted(prefixes)
    ]
    refuse_untrained(adapter, untrained_modules(adapter, others, list(adapter.modules)))
