"""Methods whose delta depends on W0."""
