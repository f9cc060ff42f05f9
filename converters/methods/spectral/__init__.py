"""Methods that decompose W0: by its singular values, or in a basis that its category of modules shares."""
