"""LoRA operators for vLLM's CPU backend that are correct for every mix of requests.

vLLM 0.32 gathers each token's factors by its slot, and a token without an adapter has slot -1, which selects the last
slot. So in a batch with LoRA requests, base requests are answered with another request's adapter
(vllm-project/vllm#48421 would fix it). Here the tokens of each slot are multiplied together and other tokens are
skipped. This is correct, and faster: no tensor of the size (tokens, out, r) is gathered.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.torch_ops import bgmv_expand
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from peanut_serve.vllm_plugin.lora.unpadded import FactorStore, FewTokens, UnpaddedFactors

logger = logging.getLogger("vllm.peanut_serve")

# the tokens of one slot: a range of rows, or their indices
_Rows = slice | Tensor
_Groups = list[tuple[int, _Rows]]

_FEW_TOKENS = 64  # as in a decoding step


class GroupedPunicaWrapperCPU(PunicaWrapperCPU):
    """`vllm/lora/punica_wrapper/punica_cpu.py`, with tokens grouped by slot once per step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if is_affected():
            logger.warning(
                "this vLLM's CPU operators apply another request's adapter to requests without one in the same batch "
                "(vllm-project/vllm#48421); using the operators of peanut-serve instead"
            )
        self._token_groups: _Groups = []
        self._sample_groups: _Groups = []
        self._few: FewTokens | None = None
        self._factors = FactorStore()

    def update_metadata(
        self, mapping: LoRAMapping, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Group the tokens of a step by slot."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slots = self.token_lora_indices
        self._token_groups = group_rows(slots)
        self._sample_groups = group_rows(self.sampler_indices)
        self._few = FewTokens(slots) if self._token_groups and len(slots) <= _FEW_TOKENS else None

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
        if not self._token_groups:
            return
        few, start, factors = self._few, 0, list[UnpaddedFactors]()
        if few is not None and buffer is None and x.shape[:-1].numel() == len(few):
            factors = [self._factors.unpadded(a, b) for a, b in zip(lora_a_stacked, lora_b_stacked, strict=True)]
        if few is None or not factors or not all(one.are_finite for one in factors):
            super().add_lora_linear(
                y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs
            )
            return
        x, y = x.view(-1, x.shape[-1]).float(), y.view(-1, y.shape[-1])
        for one, size in zip(factors, output_slices, strict=True):
            few.add(y[:, start : start + size], x, one, scale)
            start += size

    def add_shrink(
        self,
        y: tuple[Tensor, ...] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """`y[i] = scale * x @ lora_a[i].T`; rows without an adapter are unchanged."""
        x = x.view(-1, x.shape[-1])
        for into, a in zip(y, lora_a_stacked, strict=True):
            _shrink(into.view(-1, into.shape[-1]), x, a, scale, self._token_groups)

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
        """`y[:, slice i] += x[i] @ lora_b[i].T`; rows without an adapter are unchanged."""
        y = y.view(-1, y.shape[-1])
        for h, b, size in zip(x, lora_b_stacked, output_slices, strict=True):
            _expand(y[:, offset_start : offset_start + size], h, b, self._token_groups, add_inputs)
            offset_start += size

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """`y += x @ lora_b.T`."""
        _expand(y, x, lora_b_stacked, self._token_groups, add_inputs)

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
        _shrink(h, x, lora_a_stacked, scale, self._sample_groups)
        _expand(y, h, lora_b_stacked, self._sample_groups, add=True)


def group_rows(slots: Tensor) -> _Groups:
    """The rows of each slot, for slots (n,); rows of slot -1 are left out."""
    groups: _Groups = []
    for slot in torch.unique(slots).tolist():
        if slot >= 0:
            rows = (slots == slot).nonzero().squeeze(1)
            first, last = int(rows[0]), int(rows[-1])
            groups.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return groups


def is_affected() -> bool:
    """Whether this vLLM's own operators apply the last slot to a row without an adapter."""
    y = torch.zeros(1, 1)
    bgmv_expand(torch.ones(1, 1), torch.ones(1, 1, 1, 1), y, torch.tensor([-1]))
    return bool(y.any())


def _shrink(y: Tensor, x: Tensor, a: Tensor, scale: float, groups: _Groups) -> None:
    """Compute rows of `y` (n, r), which is float32, from `x` (n, in) and `a` (slots, 1, r, in), in float32."""
    for slot, rows in groups:
        factor = a[slot].view(-1, a.shape[-1]).to(y.dtype)
        y[rows, : len(factor)] = (x[rows].to(y.dtype) @ factor.T).mul_(scale)


def _expand(y: Tensor, x: Tensor, b: Tensor, groups: _Groups, add: bool) -> None:
    """Compute rows of `y` (n, out) from `x` (n, r) and `b` (slots, 1, out, r); either may have padded outputs."""
    for slot, rows in groups:
        factor = b[slot].view(-1, b.shape[-1])[: y.shape[1]].to(x.dtype)
        delta = (x[rows] @ factor.T).to(y.dtype)
        if add:
            y[rows, : len(factor)] += delta
        else:
            y[rows, : len(factor)] = delta
