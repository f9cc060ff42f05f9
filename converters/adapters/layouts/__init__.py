"""The on-disk conventions of θ, a file each: whether a source is in it and why, and how it is read."""
