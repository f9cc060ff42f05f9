"""Adapters that were trained on one part of a model of several: a language model, a tower."""
