"""The Hugging Face Hub: model names, downloads, streaming, and readable errors."""
