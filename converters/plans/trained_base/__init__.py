"""The base as it was when the training began, where that is not the checkpoint on disk."""
