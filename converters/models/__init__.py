"""Base models on disk: checkpoint, config, model class, labels and companion files."""
