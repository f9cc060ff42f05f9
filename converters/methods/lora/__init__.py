"""What HF PEFT calls LoRA beside the plain one: with biases or blocks, on embeddings, convolutions and experts."""
