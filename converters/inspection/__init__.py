"""How strongly an adapter acts where, on its base: numbers and a picture."""
