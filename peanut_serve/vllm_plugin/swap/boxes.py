"""Which part of each tensor of the checkpoint a worker loads: all of it, or its shard under tensor parallelism.

vLLM's loaders cut a shard out of a tensor as a view, and copy that. So the views that are read while a model is
loaded say which part it is, for every layer that vLLM shards: fused ones, by rows or columns, with replicated heads.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peanut_serve.vllm_plugin.swap.storages import NamedStorages

Box = tuple[slice, ...]  # one slice for each dimension


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box of a whole tensor."""
    return tuple(slice(0, size) for size in shape)


class BoxRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, records what is read of the watched tensors. Recording too much is harmless."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.boxes: dict[str, Box] = {}
        self._storages = NamedStorages()
        self._forms: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def watch(self, name: str, tensor: Tensor) -> None:
        """Record what is read of a contiguous tensor, as long as its memory is its own."""
        self._storages.add(name, tensor)
        self._forms[name] = tensor.dtype, tuple(tensor.shape)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called for every operation of torch; an operation that only makes a view reads nothing."""
        if not getattr(func, "is_view", False):
            for value in tree_leaves((args, dict(kwargs or {}))):
                if isinstance(value, Tensor) and not value.is_meta and value.layout is torch.strided:
                    self._read(value)
        return func(*args, **(kwargs or {}))

    def _read(self, view: Tensor) -> None:
        name = self._storages.name_of(view)
        if name is None or view.numel() == 0:
            return
        dtype, shape = self._forms[name]
        box = box_of(view, shape) if view.dtype == dtype else None
        box = whole_box(shape) if box is None else box
        self.boxes[name] = _around(self.boxes[name], box) if name in self.boxes else box


def box_of(view: Tensor, shape: tuple[int, ...]) -> Box | None:
    """Which box of a contiguous tensor of this shape a view shows, transposed or not; None if it is not a box."""
    strides = torch.empty(shape, device="meta").stride()
    if len(set(strides)) < len(strides):  # a dimension of size 1: it is small, or rare
        return None
    counts = dict.fromkeys(strides, 1)
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size > 1:
            if counts.get(stride) != 1:
                return None
            counts[stride] = size
    box, offset = [], int(view.storage_offset())
    for size, stride in zip(shape, strides, strict=True):
        start, offset = divmod(offset, stride)
        if start + counts[stride] > size:
            return None
        box.append(slice(start, start + counts[stride]))
    return tuple(box)


def _around(one: Box, other: Box) -> Box:
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
