"""Adaptive merging: the busy variant as merged weights, every other one beside it as a LoRA adapter of these."""
