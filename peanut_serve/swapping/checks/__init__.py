"""Whether an engine computes what it should: the canary after each swap, and tests at the start."""
