"""Sizes in human-readable form."""

import re

from converters.errors import OptionError

_MOST = 1 << 60  # bytes


def parse_size(text: str) -> int | None:
    """The number of bytes in '5GB', '500MB' or '2GiB'; None for 'base', which keeps the sharding of the base.

    Raises `OptionError` for anything else.
    """
    if text == "base":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|K|M|G|T)(i?)B", text.strip(), re.IGNORECASE)
    size = 0.0
    if found:
        power = " KMGT".index(found[2].upper() or " ")
        size = float(found[1]) * (1024 if found[3] else 1000) ** power
    if not 1 <= size < _MOST:
        raise OptionError(f"'{text}' is not a valid size; expected something like 5GB, 500MB, 2GiB, or 'base'")
    return int(size)


def size_text(size: int) -> str:
    """Bytes, for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
