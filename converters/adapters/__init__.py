"""A trained adapter, opened: where it is found, its θ, what it targets, which base it belongs to."""
