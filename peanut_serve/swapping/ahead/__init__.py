"""What is done before a swap: its variant is staged, and those that are likely next are fetched."""
