"""The operator's settings, and how they are passed from the command line to vLLM's processes."""
