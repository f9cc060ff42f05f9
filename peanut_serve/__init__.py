"""Serving of PEANuT task variants. The converters it builds on are in `converters`."""
