"""Rotations of blocks of a weight's columns, each minus the identity: what they change."""

import torch
from torch import Tensor


def cayley(q: Tensor) -> Tensor:
    """`R − I` of the Cayley transforms `R = (I − Q)(I + Q)⁻¹` of skew-symmetric matrices (blocks, b, b)."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    change: Tensor = torch.linalg.solve(identity + q, -2 * q, left=False)
    return change


def neumann(q: Tensor, terms: int) -> Tensor:
    """`R − I` of the series `2Q + 2Q² + ... + Qᵏ`, the first terms of `(I + Q)(I − Q)⁻¹`.

    HF PEFT goes to k = terms − 1, but at least to 3.
    """
    if terms < 3:
        return 2 * q * (terms - 1)
    power, total = q, 2 * q
    for exponent in range(2, max(3, terms - 1) + 1):
        power = power @ q
        total = total + (power if exponent == max(3, terms - 1) else 2 * power)
    return total


def turn_blocks(w0: Tensor, change: Tensor) -> Tensor:
    """`W0 (R − I)ᵀ` for rows of W0 (n, in).

    Args:
        w0: the rows.
        change: `R − I` of every block of columns (blocks, b, b), or (1, b, b) for all of them.
    """
    blocks = w0.reshape(len(w0), -1, change.shape[-1])
    return torch.einsum("nbk,bck->nbc", blocks, change.expand(blocks.shape[1], -1, -1)).reshape(w0.shape)
