"""What HF PEFT trains beside deltas of linear layers: tensors that are replaced whole, rows of embeddings."""
