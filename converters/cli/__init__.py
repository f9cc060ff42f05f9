"""The commands `peanut-merge` and `peanut-inspect`."""

from converters.cli.main import inspect_main, merge_main

__all__ = ["inspect_main", "merge_main"]
