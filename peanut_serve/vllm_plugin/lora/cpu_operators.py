"""LoRA on vLLM's CPU backend, correct for every mix of requests.

vLLM 0.32 gathers each token's factors by its slot, and a token without an adapter has slot -1: the last one. So in a
batch with LoRA requests, base requests are answered by somebody's adapter (vllm-project/vllm#48421 would mend it).
Here the tokens of each slot are multiplied together and the others left alone, which is right, and faster: nothing
of the size (tokens, out, r) is gathered.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.torch_ops import bgmv_expand
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

logger = logging.getLogger("vllm.peanut_serve")

# the tokens of one slot: a range of rows, or their indices
_Rows = slice | Tensor
_Groups = list[tuple[int, _Rows]]

_FEW_TOKENS = 64  # a step of decoding


class GroupedPunicaWrapperCPU(PunicaWrapperCPU):
    """`vllm/lora/punica_wrapper/punica_cpu.py`, with the tokens grouped by slot once a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if is_affected():
            logger.warning(
                "This vLLM's CPU operators answer requests without an adapter with somebody's, when both are in one "
                "batch (vllm-project/vllm#48421); peanut-serve's operators are used instead"
            )
        self._of_tokens: _Groups = []
        self._of_samples: _Groups = []
        self._own: Tensor | None = None  # (tokens, slots): 1 in the slot of each token, to do all slots at once

    def update_metadata(
        self, mapping: LoRAMapping, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Take over the slots of a step."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slots = self.token_lora_indices
        self._of_tokens = group_rows(slots)
        self._of_samples = group_rows(self.sampler_indices)
        self._own = None
        if len(self._of_tokens) > 1 and len(slots) <= _FEW_TOKENS:
            self._own = (slots[:, None] == torch.arange(len(lora_index_to_id))).float()

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """`y[:, slice i] += scale * x @ lora_a[i].T @ lora_b[i].T`."""
        if buffer is None and self._own is not None and x.shape[:-1].numel() == len(self._own):
            add_at_once(y, x, lora_a_stacked, lora_b_stacked, output_slices, self._own * scale)
        else:
            super().add_lora_linear(
                y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs
            )

    def add_shrink(
        self,
        y: tuple[Tensor, ...] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """`y[i] = scale * x @ lora_a[i].T`; rows without an adapter stay as they are."""
        x = x.view(-1, x.shape[-1])
        for into, a in zip(y, lora_a_stacked, strict=True):
            _shrink(into.view(-1, into.shape[-1]), x, a, scale, self._of_tokens)

    def add_expand(
        self,
        y: Tensor,
        x: tuple[Tensor, ...] | Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """`y[:, slice i] += x[i] @ lora_b[i].T`; rows without an adapter stay as they are."""
        y = y.view(-1, y.shape[-1])
        for h, b, size in zip(x, lora_b_stacked, output_slices, strict=True):
            _expand(y[:, offset_start : offset_start + size], h, b, self._of_tokens, add_inputs)
            offset_start += size

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """`y += x @ lora_b.T`."""
        _expand(y, x, lora_b_stacked, self._of_tokens, add_inputs)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """`y += scale * x @ lora_a.T @ lora_b.T` for the rows that are sampled from."""
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        h = torch.zeros(len(x), lora_b_stacked.shape[-1]) if buffer is None else buffer
        _shrink(h, x, lora_a_stacked, scale, self._of_samples)
        _expand(y, h, lora_b_stacked, self._of_samples, add=True)


def group_rows(slots: Tensor) -> _Groups:
    """The rows of each slot (n,); those of slot -1 are left out."""
    groups: _Groups = []
    for slot in torch.unique(slots).tolist():
        if slot >= 0:
            rows = (slots == slot).nonzero().squeeze(1)
            first, last = int(rows[0]), int(rows[-1])
            groups.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return groups


def add_at_once(
    y: Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    lora_b_stacked: tuple[Tensor, ...],
    output_slices: tuple[int, ...],
    own: Tensor,
) -> None:
    """For few tokens of several slots: multiply all with every slot, and keep each token's own.

    The time of such a step goes into the number of operations, not of numbers. `own` (n, slots) holds the scale in
    the slot of each token, and zeros.
    """
    x, y, start = x.view(-1, x.shape[-1]).float(), y.view(-1, y.shape[-1]), 0
    for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        h = (x @ a.view(-1, a.shape[-1]).float().T).view(*own.shape, -1) * own[:, :, None]  # (n, slots, r)
        delta = torch.bmm(h.transpose(0, 1), b.squeeze(1).float().transpose(1, 2)).sum(0)  # (n, out)
        y[:, start : start + size] += delta[:, :size].to(y.dtype)
        start += size


def is_affected() -> bool:
    """Whether this vLLM's own operators give a row without an adapter the last slot's."""
    y = torch.zeros(1, 1)
    bgmv_expand(torch.ones(1, 1), torch.ones(1, 1, 1, 1), y, torch.tensor([-1]))
    return bool(y.any())


def _shrink(y: Tensor, x: Tensor, a: Tensor, scale: float, groups: _Groups) -> None:
    """Rows of `y` (n, r) from `x` (n, in) and `a` (slots, 1, r, in). In the dtype of `y`, which is float32."""
    for slot, rows in groups:
        factor = a[slot].view(-1, a.shape[-1]).to(y.dtype)
        y[rows, : len(factor)] = (x[rows].to(y.dtype) @ factor.T).mul_(scale)


def _expand(y: Tensor, x: Tensor, b: Tensor, groups: _Groups, add: bool) -> None:
    """Rows of `y` (n, out) from `x` (n, r) and `b` (slots, 1, out, r); one may be padded to more outputs."""
    for slot, rows in groups:
        factor = b[slot].view(-1, b.shape[-1])[: y.shape[1]].to(x.dtype)
        delta = (x[rows] @ factor.T).to(y.dtype)
        if add:
            y[rows, : len(factor)] += delta
        else:
            y[rows, : len(factor)] = delta
