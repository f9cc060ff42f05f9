"""The public functions: merge and export in one call."""
