"""Swapping merged weights in a running engine: policy, gate, transaction, driver."""
