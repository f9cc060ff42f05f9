"""LoRA inside vLLM: the resolver, live adapters, corrected CPU operators."""
