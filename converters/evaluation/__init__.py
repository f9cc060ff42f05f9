"""Carrying out the arithmetic of a plan: workers, blocks of rows, factors, verification."""
