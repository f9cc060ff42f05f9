"""Methods whose delta is a product of two factors that θ alone gives: LoRA, exactly, of a rank that is known."""
