"""PEANuT: its tweaker in every orientation, of which plain LoRA is one, and what it is made of."""
