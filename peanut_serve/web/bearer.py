"""The keys that clients send as `Authorization: Bearer KEY`."""

import hashlib
import secrets
from collections.abc import Iterable, MutableMapping
from functools import cache
from pathlib import Path
from typing import Any

from converters.errors import OptionError


class BearerKeys:
    """Keys that are accepted. Their hashes are compared, in constant time.

    Args:
        keys: any text that a header can hold; an empty one is left out.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [_hash(key.encode()) for key in keys if key]

    def include(self, scope: MutableMapping[str, Any]) -> bool:
        """Whether a request, an ASGI scope, has one of the keys."""
        given = _hash(sent_key(scope))
        matches = [secrets.compare_digest(given, known) for known in self._hashes]  # with every key, found or not
        return any(matches)


def sent_key(scope: MutableMapping[str, Any]) -> bytes:
    """The key of a request; empty, which no key is, if it has none."""
    scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    return bytes(key.strip()) if scheme.lower() == b"bearer" else b""


@cache  # of known keys only
def fingerprint(key: bytes) -> str:
    """What a log may say of a known key: 12 hexadecimal digits. Slow, so that a log does not help to guess it."""
    return hashlib.scrypt(key, salt=b"peanut-serve", n=1 << 14, r=8, p=1, dklen=6).hex()


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
