"""Serve PEANuT adapters: by name on vLLM (`peanut-serve`, or vLLM with this package installed), and offline."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peanut_serve.lora.offline import LoraRequests

__all__ = ["LoraRequests"]


def __getattr__(name: str) -> object:
    """Import `LoraRequests` on first use: it imports torch."""
    if name != "LoraRequests":
        raise AttributeError(f"module 'peanut_serve' has no attribute '{name}'")
    from peanut_serve.lora.offline import LoraRequests

    return LoraRequests
