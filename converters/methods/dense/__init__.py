"""Methods whose delta is given by θ alone, and has no rank that is smaller than the weight's."""
