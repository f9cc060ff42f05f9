"""The format `merged`: a checkpoint that every runtime loads."""
