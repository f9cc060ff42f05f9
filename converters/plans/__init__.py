"""What will happen to each tensor of an output. Everything that can be refused is refused here."""
