"""Variants: their names, their versions, what is remembered of them, their weights on the host."""
