"""Hashes of whole files."""

from pathlib import Path

import xxhash


def hash_file(file: Path) -> str:
    """Hex digest of the xxh3_128 hash of a file."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
