"""W0 in the memory of a worker's device, as much of it as the worker loads, and what variants make of it there."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from converters.errors import PeanutError
from converters.serving import TensorInfo, TensorReader
from peanut_serve.variants.host_weights import available_memory
from peanut_serve.variants.on_device.factors import arithmetic_of
from peanut_serve.vllm_plugin.swap.boxes import Box, whole_box

_BLOCK = 1 << 24  # numbers that are evaluated at once
_SPARE = 64 << 20  # bytes, for what else allocates


class KeptWeightsError(PeanutError):
    """The worker does not have the copy of W0 that a swap needs, or an evaluated weight is not finite."""


class KeptWeights:
    """Copies of W0.

    Args:
        device: of the worker.
        boxes: tensor of the checkpoint -> the part that the worker loads; all of those that are not named.
    """

    def __init__(self, device: torch.device, boxes: Mapping[str, Box]) -> None:
        self.device = device
        self._boxes = boxes
        self._kept: dict[str, Tensor] = {}
        self._is_finite: dict[str, Tensor] = {}  # of what was evaluated since `check`

    @property
    def nbytes(self) -> int:
        """Size of the copies."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    def needed(self, infos: Sequence[TensorInfo]) -> int:
        """Bytes to allocate: for those that are not kept yet, for factors, and to evaluate the largest one."""
        missing = [info for info in infos if info.name not in self._kept]
        if not missing:
            return 0
        own = sum(_size(self._box(info)) * info.torch_dtype.itemsize for info in missing)
        largest = max(info.nbytes for info in missing)
        return own + own // 2 + largest + 2 * _BLOCK * 8 + _SPARE

    def free(self) -> int:
        """Bytes that can be allocated on the device: free ones, and those that torch has freed and holds."""
        if self.device.type == "cpu":
            return available_memory()
        free, _ = torch.accelerator.get_memory_info(self.device)
        held = torch.accelerator.memory_reserved(self.device) - torch.accelerator.memory_allocated(self.device)
        return int(free + held)

    def keep(self, infos: Sequence[TensorInfo]) -> None:
        """Copy the worker's part of tensors from the base's files, one after the other."""
        with TensorReader() as reader:
            for info in infos:
                if info.name not in self._kept:
                    part = reader.whole(info)[self._box(info)]
                    self._kept[info.name] = part.to(self.device, copy=True, memory_format=torch.contiguous_format)

    def whole(self, info: TensorInfo) -> Tensor:
        """W0 as vLLM loads it: with its shape in the checkpoint, and NaN where this worker does not read it."""
        kept, box = self._of(info), self._box(info)
        if box == whole_box(info.shape):
            return kept
        full = self._unread(info)
        full[box] = kept
        return full

    def updated(self, info: TensorInfo, up: Tensor, down: Tensor) -> Tensor:
        """`W0 + up @ down`, rounded once, in the form of `whole`.

        Args:
            info: W0 (out, in).
            up: (out, r), on the device.
            down: (r, in), on the device.
        """
        kept, box = self._of(info), self._box(info)
        rows, columns = box
        full = torch.empty_like(kept) if box == whole_box(info.shape) else self._unread(info)
        into = full[box]
        evaluate(kept, up[rows], down[:, columns], into)
        self._is_finite[info.name] = into.isfinite().all()
        return full

    def check(self) -> None:
        """Raise `KeptWeightsError` if a weight that was evaluated since the last call is not finite."""
        flags, self._is_finite = self._is_finite, {}
        if not flags:
            return
        for name, is_finite in zip(flags, torch.stack([*flags.values()]).tolist(), strict=True):
            if not is_finite:
                raise KeptWeightsError(f"{name}: W0 + up @ down does not fit its dtype; is θ damaged?")

    def forget(self) -> None:
        """Drop what `check` would look at: the swap has failed for another reason."""
        self._is_finite = {}

    def _of(self, info: TensorInfo) -> Tensor:
        if info.name not in self._kept:
            raise KeptWeightsError(f"this worker has no copy of {info.name} in the memory of {self.device}")
        return self._kept[info.name]

    def _box(self, info: TensorInfo) -> Box:
        return self._boxes.get(info.name, whole_box(info.shape))

    def _unread(self, info: TensorInfo) -> Tensor:
        return torch.full(info.shape, torch.nan, dtype=info.torch_dtype, device=self.device)


def evaluate(w0: Tensor, up: Tensor, down: Tensor, into: Tensor) -> None:
    """Write `w0 + up @ down` into a tensor, rounded once to its dtype; `arithmetic_of` says how exactly.

    Args:
        w0: (out, in).
        up: (out, r).
        down: (r, in).
        into: (out, in).
    """
    dtype = arithmetic_of(w0.dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # with TF32 or bfloat16 inside, it would be 2^-11 or 2^-8 off
    try:
        up, down = up.to(dtype), down.to(dtype)
        rows = max(1, _BLOCK // max(1, w0.shape[1]))
        for start in range(0, w0.shape[0], rows):
            block = slice(start, start + rows)
            into[block] = torch.addmm(w0[block].to(dtype), up[block], down)
    finally:
        torch.set_float32_matmul_precision(before)


def _size(box: Box) -> int:
    return math.prod(part.stop - part.start for part in box)
