"""Layers as vLLM's CPU backend has packed them, kept for the next swap to the same weights: it exchanges them whole.

On the CPU, vLLM packs the weight of every linear layer anew when it is loaded, on one thread, and keeps the packed
copy in the closure `cpu_linear` of the layer. A layer that is loaded from the same bytes gets an equal copy, so the
closure of the first time does. What a layer was loaded from is known by place, and places do not change: the server's
host memory is sealed, and W0 and factors are not written again.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.serving import TensorInfo
from peanut_serve.variants.host_weights import available_memory
from peanut_serve.variants.on_device.places import KeptTensor, Place

_SPARE = 1 << 30  # bytes of host memory that are left to others
# a layer that was exchanged within so many loads is not dropped for another one: if variants that take turns do not
# all fit, some of their layers stay, and it is not always the next one that was dropped last
_TURNS = 16

Key = tuple[tuple[Any, ...], ...]  # where each tensor of a layer was loaded from


@dataclass(frozen=True)
class _Packed:
    """A layer as it was after it was loaded."""

    multiply: Callable[..., Tensor]  # with the packed weight in its closure
    parameters: Mapping[str, Tensor]  # copies, such as of its bias
    places: tuple[Place, ...]  # its tensors come from
    nbytes: int


class PackedLayers:
    """Packed layers, the least recently used first. One that was used lately is not dropped for another.

    Args:
        limit: of their size, in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._packed: OrderedDict[tuple[int, Key], _Packed] = OrderedDict()
        self._loads = 0
        self._used: dict[tuple[int, Key], int] = {}  # in which load
        self._names: dict[int, tuple[torch.nn.Module, tuple[str, ...]]] = {}  # layer -> the tensors it is loaded from
        self._layers: dict[str, set[int]] = {}  # and the other way round, for every layer

    @property
    def nbytes(self) -> int:
        """Size of all packed layers that are kept."""
        return sum(packed.nbytes for packed in self._packed.values())

    def exchange(self, places: Sequence[Place]) -> list[Place]:
        """Give each layer its packed weight, if it was loaded from the same places before; returns what is left.

        Tensors that are loaded into several layers are left, unless all of them have theirs.
        """
        self._loads += 1
        keys = _Keys()
        self._forget_closed(keys)
        wanted = {place.name: place for place in places}
        done = {layer for layer, (_, names) in self._names.items() if self._restore(layer, names, wanted, keys)}
        return [place for place in places if not (own := self._layers.get(place.name)) or not own <= done]

    def _restore(self, layer: int, names: tuple[str, ...], wanted: Mapping[str, Place], keys: "_Keys") -> bool:
        if not all(name in wanted for name in names):
            return False
        key = layer, keys.of([wanted[name] for name in names])
        if (packed := self._packed.get(key)) is None:
            return False
        self._packed.move_to_end(key)
        self._used[key] = self._loads
        module, _ = self._names[layer]
        setattr(module, _MULTIPLY, packed.multiply)
        for name, value in packed.parameters.items():
            module.get_parameter(name).data.copy_(value)
        return True

    def remember(
        self, places: Sequence[Place], layers: Mapping[str, set[int]], modules: Mapping[int, torch.nn.Module]
    ) -> None:
        """Keep the layers that were just loaded, as far as they fit.

        Args:
            places: what was loaded.
            layers: name of a tensor -> the layers that it was loaded into.
            modules: the layers.
        """
        if self._limit == 0:
            return
        wanted = {place.name: place for place in places}
        own: dict[int, list[str]] = {}
        free, keys = available_memory() - _SPARE, _Keys()
        for name, into in layers.items():
            self._layers[name] = set(into)
            for layer in into:
                own.setdefault(layer, []).append(name)
        for layer, names in own.items():
            module = modules[layer]
            sources = tuple(wanted[name] for name in sorted(names))
            if not _is_packed(module) or not all(map(_is_constant, sources)):
                self._names.pop(layer, None)
                continue
            self._names[layer] = module, tuple(sorted(names))
            packed = _packed(module, sources)
            if packed.nbytes <= min(free, self._limit) and self._add((layer, keys.of(sources)), packed):
                free -= packed.nbytes

    def _add(self, key: tuple[int, Key], packed: _Packed) -> bool:
        self._drop(key)
        while self._packed and self.nbytes + packed.nbytes > self._limit:
            oldest = next(iter(self._packed))
            if self._loads - self._used[oldest] < _TURNS:
                return False
            self._drop(oldest)
        self._packed[key], self._used[key] = packed, self._loads
        return True

    def _drop(self, key: tuple[int, Key]) -> None:
        self._packed.pop(key, None)
        self._used.pop(key, None)

    def _forget_closed(self, keys: "_Keys") -> None:
        """Drop layers whose sources the server has dropped: the memory is to be free, and the path is used again."""
        for key in [key for key, packed in self._packed.items() if key[1] != keys.of(packed.places)]:
            self._drop(key)

    def clear(self) -> None:
        """Drop all: something failed, and nothing that was kept is to be trusted."""
        self._packed.clear()
        self._used.clear()
        self._names.clear()


_MULTIPLY = "cpu_linear"  # which vLLM's `dispatch_cpu_unquantized_gemm` sets


def _is_packed(module: torch.nn.Module) -> bool:
    """Whether all that a layer computes with is packed, and no weight is left beside it."""
    weight = getattr(module, "weight", None)
    return hasattr(module, _MULTIPLY) and isinstance(weight, Tensor) and weight.numel() == 0


def _packed(module: torch.nn.Module, places: tuple[Place, ...]) -> _Packed:
    own = {name: value.detach().clone() for name, value in module.named_parameters(recurse=False) if value.numel()}
    layer: Any = module
    inputs = getattr(layer, "input_size_per_partition", None) or layer.input_size
    outputs = getattr(layer, "output_size_per_partition", None) or layer.output_size
    nbytes = int(inputs) * int(outputs) * layer.weight.element_size() + sum(value.nbytes for value in own.values())
    return _Packed(getattr(layer, _MULTIPLY), own, places, nbytes)


class _Keys:
    """Keys of places at one moment: each file is looked at once."""

    def __init__(self) -> None:
        self._inodes: dict[Path, int] = {}

    def of(self, places: Sequence[Place]) -> Key:
        """The identity of what a layer is loaded from."""
        return tuple(map(self._identity, places))

    def _identity(self, place: Place) -> tuple[Any, ...]:
        if isinstance(place, TensorInfo):
            return place.name, str(place.file), self._inode(place.file), place.offset, place.nbytes
        if isinstance(place, KeptTensor):
            return place.name, "kept"
        return place.name, "updated", self._identity(place.up), self._identity(place.down)

    def _inode(self, file: Path) -> int:
        if file not in self._inodes:
            try:
                self._inodes[file] = file.stat().st_ino
            except OSError:
                self._inodes[file] = -1  # it was closed
        return self._inodes[file]


def _files(place: Place) -> list[TensorInfo]:
    if isinstance(place, TensorInfo):
        return [place]
    return [] if isinstance(place, KeptTensor) else [place.up, place.down]


def _is_constant(place: Place) -> bool:
    """Whether it can only be what it is: files of the server's memory are sealed, others may change."""
    return all(info.file.is_relative_to("/proc") for info in _files(place))
