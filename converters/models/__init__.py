"""A base model on disk: its checkpoint, config, class, labels and companion files."""
