"""The command `peanut-serve`."""

from peanut_serve.cli.main import main

__all__ = ["main"]
