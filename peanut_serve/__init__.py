"""Serve PEANuT adapters: by name on vLLM (`peanut-serve`, or vLLM with this package installed), and offline."""

from peanut_serve.lora.offline import LoraRequests

__all__ = ["LoraRequests"]
