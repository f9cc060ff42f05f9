"""What the operator chose, on its way from the command line to vLLM's processes."""
