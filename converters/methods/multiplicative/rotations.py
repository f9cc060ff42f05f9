"""Rotations of blocks of a weight's columns, each minus the identity: what they change."""

import torch
from torch import Tensor


def cayley(q: Tensor) -> Tensor:
    """`R − I` of the Cayley transforms `R = (I − Q)(I + Q)⁻¹` of skew-symmetric matrices (blocks, b, b)."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    change: Tensor = torch.linalg.solve(identity + q, -2 * q, left=False)
    return change


def turn_blocks(w0: Tensor, change: Tensor) -> Tensor:
    """`W0 (R − I)ᵀ` for rows of W0 (n, in).

    Args:
        w0: the rows.
        change: `R − I` of every block of columns (blocks, b, b), or (1, b, b) for all of them.
    """
    blocks = w0.reshape(len(w0), -1, change.shape[-1])
    return torch.einsum("nbk,bck->nbc", blocks, change.expand(blocks.shape[1], -1, -1)).reshape(w0.shape)
