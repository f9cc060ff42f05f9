"""Swapping inside vLLM: the worker extension, the engine, the endpoint plugin."""
