"""What lies beside the weights of an output, and whether it agrees with them."""
