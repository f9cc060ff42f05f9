"""How much an adapter changes each module of its base, as numbers and as a plot."""
