"""JSON companions in an encoding that their readers take: transformers and tokenizers read UTF-8 without a mark."""

import json
from collections.abc import Mapping
from dataclasses import replace

from converters.models.companions.companion import Companion

_PLAIN = "utf-8"
_HEAD = 4  # bytes that tell the encoding of JSON


def in_plain_utf8(files: Mapping[str, Companion]) -> dict[str, Companion]:
    """The same files, with JSON in UTF-16, or with a byte-order mark, encoded anew. Such a file cannot be loaded.

    A file that is not in the encoding that it begins with is left as it is.
    """
    return {name: _plain(one) if name.endswith(".json") else one for name, one in files.items()}


def _plain(companion: Companion) -> Companion:
    if companion.content is not None:
        return companion  # written by this package
    with companion.source.open("rb") as file:
        encoding = json.detect_encoding(file.read(_HEAD))
    if encoding == _PLAIN:
        return companion
    try:
        content = companion.source.read_bytes().decode(encoding).encode()
    except UnicodeDecodeError:
        return companion
    return replace(companion, content=content, change=f"encoded in UTF-8 instead of {encoding}")
