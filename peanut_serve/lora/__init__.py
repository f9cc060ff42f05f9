"""Adapters served as LoRA: converted on first use and cached on disk."""
