"""Variants for workers that keep W0 in the memory of their device: exact factors, and where a tensor comes from."""
