"""Bounds of the numbers that options take. What is not a number, or is out of bounds, is a usage error."""

import math

import typer

SECONDS = 1_000_000.0  # the longest time that an option of seconds takes: more than 11 days
COUNT = 1_000_000  # the most of anything that is counted


def finite(value: float | None) -> float | None:
    """The callback of an option: bounds do not keep out `nan`, as it is neither below nor above them."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value
