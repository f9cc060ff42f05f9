"""What is written, a file or folder per format."""
