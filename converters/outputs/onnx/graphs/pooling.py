"""Embeddings of texts from those of their tokens, as sentence-transformers computes them."""

from collections.abc import Callable

import torch
from torch import Tensor

from converters.inference.sentences import Sentences

_LEAST = 1e-9  # of what is divided by


def pool(hidden: Tensor, attention_mask: Tensor, sentences: Sentences) -> Tensor:
    """The embeddings (batch, width) of tokens (batch, sequence, hidden)."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (batch, sequence, 1)
    embedding = torch.cat([_MODES[name](hidden, mask) for name in sentences.pooling], dim=1)
    return torch.nn.functional.normalize(embedding, p=2.0, dim=1) if sentences.normalizes else embedding


def _sum(hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return (hidden * weights).sum(1), weights.sum(1).clamp(min=_LEAST)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    total, count = _sum(hidden, mask)
    return total / count


def _mean_by_root(hidden: Tensor, mask: Tensor) -> Tensor:
    total, count = _sum(hidden, mask)
    return total / count.sqrt()


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Later tokens weigh more: by their number, the first column of padding counted."""
    numbers = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[None, :, None]
    return _mean(hidden, mask * numbers)


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    columns = torch.arange(hidden.shape[1])[None, :, None]
    last = (columns * mask.long()).argmax(1)  # (batch, 1)
    return (hidden * (columns == last[:, None]).to(hidden.dtype) * mask).sum(1)


_MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda hidden, mask: hidden[:, 0],
    "max": lambda hidden, mask: hidden.masked_fill(mask == 0, -1e9).amax(1),
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
