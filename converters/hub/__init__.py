"""The Hugging Face Hub: names, downloads, streaming, and its errors in plain words."""
