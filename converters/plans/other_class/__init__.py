"""Adapters that were trained on another class of model than the base's: on a part of it, or on a whole around it."""
