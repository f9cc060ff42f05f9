"""How far rounded numbers are from exact ones."""

import torch


def excess(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """How much nearer to the exact value a neighbour of `found` is, in units of its last place; 0 if none is."""
    bits = {2: torch.int16, 4: torch.int32}[found.element_size()]
    exact, found = exact[found != 0], found[found != 0]  # the neighbours of zero have no common bits
    error, worst = (found.double() - exact).abs(), torch.zeros_like(exact)
    for step in (1, -1):
        neighbour = (found.view(bits) + step).view(found.dtype).double()
        gain = (error - (neighbour - exact).abs()) / (neighbour - found.double()).abs()
        worst = torch.maximum(worst, gain)
    return worst


def tolerance(weights: torch.Tensor) -> torch.Tensor:
    """How far two evaluations of 16 bits may differ, one in float32: a last place, and what float32 loses.

    That is relative to the magnitudes that are added up; here they are taken to be at most eight times the largest
    result.
    """
    eps = torch.finfo(weights.dtype).eps
    return weights.double().abs() * eps + weights.double().abs().max() * 8 * 40 * 2.0**-24
