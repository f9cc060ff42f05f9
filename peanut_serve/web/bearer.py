"""The keys that clients send as `Authorization: Bearer KEY`."""

import hashlib
import secrets
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any

from converters.errors import OptionError


class BearerKeys:
    """Keys that are accepted. Their hashes are compared, in constant time.

    Args:
        keys: any text that a header can hold.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [_hash(key.encode()) for key in keys]

    def include(self, scope: MutableMapping[str, Any]) -> bool:
        """Whether a request, an ASGI scope, has one of the keys."""
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        given = _hash(key.strip())
        matches = [secrets.compare_digest(given, known) for known in self._hashes]  # with every key, found or not
        return scheme.lower() == b"bearer" and any(matches)


def read_keys(file: Path | None) -> list[str]:
    """The keys in a file. Raises `OptionError` for a file without any, which would let everybody in."""
    if file is None:
        return []
    try:
        keys = file.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the keys in {file} cannot be read: {error}") from None
    if not keys:
        raise OptionError(f"there is no key in {file}; expected one in each line")
    return keys


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
