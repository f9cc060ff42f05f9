"""Adapters of programs that are not read: how their files and keys are recognised, and what to do with them."""
