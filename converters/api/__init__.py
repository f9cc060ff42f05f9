"""The public functions: merge and export in one call, and the options as objects."""
