"""Adapters served as LoRA: converted on first use, cached on disk."""
