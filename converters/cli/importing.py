"""Importing what a command needs, in less time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_that_stay() -> Iterator[None]:
    """Import inside this block what is needed until the end.

    PyTorch's import makes hundreds of thousands of objects. Python would look through them for garbage time and again
    while it imports, and twice more when it exits: half a second in which nothing is found.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
