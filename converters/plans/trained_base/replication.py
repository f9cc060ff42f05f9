"""Layers that were stacked before the training: `layer_replication` of a LoraConfig, depth up-scaling.

PEFT (`peft/tuners/tuners_utils.py`, `replicate_layers`) replaces the list of layers by copies of them that share
their weights and have θ of their own. `[[0, 4], [2, 5]]` makes layers 0, 1, 2, 3, 2, 3, 4. A merged checkpoint has
each of them with weights of its own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from converters.adapters.adapter import Adapter
from converters.errors import AdapterConfigError, OptionError, TargetError
from converters.files.header import TensorInfo
from converters.models import config as model_config
from converters.models.architecture import Architecture, build_architecture
from converters.models.checkpoint import Checkpoint

# where PEFT looks for the list: model(.model)*(.bert).{layers, encoder.layer, h}
_LAYER = re.compile(r"(?P<list>(?:model\.)*(?:bert\.)?(?:layers|encoder\.layer|h))\.(?P<index>\d+)\.(?P<rest>.*)")

# attributes of modules that count the layers, and that PEFT sets anew
_POSITIONS = ("layer_idx",)


def replicate_layers(base: Checkpoint, adapters: Sequence[Adapter]) -> tuple[Checkpoint, list[str]]:
    """The base with the layers that the adapters were trained on; returns it with notes.

    Raises:
        OptionError: the adapters were trained on different stacks; the base is streamed, or inside the adapter.
        AdapterConfigError: the config names layers that the base has not.
        TargetError: a layer of the stack would compute something else than the one it is a copy of.
    """
    wanted = {adapter.layer_replication for adapter in adapters}
    if wanted == {()}:
        return base, []
    stacked = next(adapter for adapter in adapters if adapter.layer_replication)
    _refuse_where_not_possible(base, stacked, several=len(wanted) > 1)
    arch = build_architecture(base.config, base.architecture)
    old = sorted({int(found["index"]) for name in arch.shapes if (found := _LAYER.fullmatch(name))})
    if not old or not any(map(_LAYER.fullmatch, base.tensors)):
        raise TargetError(
            f"{stacked.path} has layer_replication, which PEFT applies to a list of layers called layers, "
            f"encoder.layer or h; {arch.name} has none at such a place; is this the base it was trained on?"
        )
    sources = _sources(stacked, len(old))
    config = model_config.with_layers(base.config, len(old), sources)
    _check_layers(stacked, base.config, config, arch, sources)
    tensors = _stack(base.tensors, sources)
    pairs = [list(pair) for pair in stacked.layer_replication]
    note = f"layers: {len(old)} become {len(sources)}, stacked as layer_replication {pairs} says"
    left_out = sorted(set(old) - set(sources))
    notes = [note, f"layers {left_out} of the base are not in the stack"] if left_out else [note]
    changes = {**base.changes, "layer_replication": pairs}
    original = base.original or base
    return replace(base, tensors=tensors, config=config, original=original, changes=changes), notes


def _refuse_where_not_possible(base: Checkpoint, stacked: Adapter, several: bool) -> None:
    if several:
        raise OptionError(
            f"{stacked.path} was trained on a stack of the base's layers (layer_replication), another adapter on a "
            "different one, or on the base as it is: they have no sum; merge each by itself"
        )
    if base.stream is not None:
        raise OptionError(
            f"stream=True: {stacked.path} has layer_replication, and the layers that it stacks are read several "
            "times; leave out stream="
        )
    if base.holder is not None:
        raise OptionError(
            f"base='self': {stacked.path} has layer_replication, and the weights inside it are stacked already; give "
            "the base that it was trained on"
        )


def _sources(adapter: Adapter, count: int) -> list[int]:
    """For each layer of the stack, the layer of the base that it is a copy of."""
    for start, end in adapter.layer_replication:
        if not 0 <= start < end <= count:
            raise AdapterConfigError(
                f"{adapter.path}: layer_replication has [{start}, {end}], and the base has {count} layers; is this "
                "the base it was trained on?"
            )
    return [layer for start, end in adapter.layer_replication for layer in range(start, end)]


def _stack(tensors: Mapping[str, TensorInfo], sources: Sequence[int]) -> dict[str, TensorInfo]:
    """The tensors of the stack, each where its layer's are, and those outside of layers."""
    stacked: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        found = _LAYER.fullmatch(name)
        if found is None:
            stacked[name] = info
            continue
        for layer in (new for new, source in enumerate(sources) if source == int(found["index"])):
            new_name = f"{found['list']}.{layer}.{found['rest']}"
            stacked[new_name] = replace(info, name=new_name)
    return stacked


def _check_layers(
    adapter: Adapter, old: Mapping[str, Any], new: Mapping[str, Any], arch: Architecture, sources: Sequence[int]
) -> None:
    """Compare the layers of the stack, as transformers will build them, with those that they are copies of.

    PEFT copies modules, whatever they compute. Where the kind of a layer follows from its place (sliding windows,
    experts in every other layer), the merged model would compute something else. Raises `TargetError` then.
    """
    stack = build_architecture(new, arch.name)
    found: set[int] = set()
    for name, value in [*stack.shapes.items(), *stack.settings.items()]:
        match = _LAYER.fullmatch(f"{name}.")
        if match is None:
            same = name not in stack.shapes or value == arch.shapes.get(name)
        else:
            layer = int(match["index"])
            found.add(layer)
            origin = (
                f"{match['list']}.{sources[layer]}.{match['rest']}".removesuffix(".") if layer < len(sources) else ""
            )
            same = _comparable(value) == _comparable(arch.shapes.get(origin, arch.settings.get(origin)))
        if not same:
            raise TargetError(
                f"{adapter.path}: {name} of the layers that layer_replication stacks would be built otherwise by "
                f"{arch.name} than in the layer that is copied: no checkpoint computes what was trained; serve it "
                "with PEFT's PeftModel"
            )
    if found != set(range(len(sources))):
        raise TargetError(f"{adapter.path}: {arch.name} cannot be built with {len(sources)} layers from its config")
    _check_kinds(adapter, old, new)


def _comparable(value: Any) -> Any:
    """What has to be equal of a tensor's shape, or of the attributes of a module."""
    if not isinstance(value, dict):
        return value
    return {name: one for name, one in value.items() if name not in _POSITIONS}


def _check_kinds(adapter: Adapter, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse kinds of layers that today's PEFT takes by place, from the config of the base, in another order."""
    for key, kinds in old.items():
        if "layer" not in key or not isinstance(kinds, list) or new.get(key) == kinds:
            continue
        stacked = new[key]
        if len(stacked) <= len(kinds) and stacked != kinds[: len(stacked)]:
            raise TargetError(
                f"{adapter.path}: the layers of the base are of several kinds ({key}), and layer_replication changes "
                "their order: releases of transformers differ in which kind a stacked layer is; serve it with PEFT's "
                "PeftModel and the transformers that trained it"
            )
