"""The files beside the weights, in sets that belong together: a set comes whole from the adapter or the base."""
