"""Files that people write by hand: a large one is a mistake, and is not read into memory."""

from pathlib import Path

from converters.errors import OptionError

_KIB = 1 << 10


def read_small(file: Path, most: int, name: str, cure: str = "") -> bytes:
    """The content of a file.

    Args:
        file: it.
        most: bytes that it may have.
        name: of the file in messages.
        cure: what to do about a larger one, for the message.

    Raises `OptionError` if it cannot be read, or is larger.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(most + 1)
    except OSError as error:
        raise OptionError(f"{name} cannot be read: {error.strerror}") from None
    if len(content) > most:
        size = f"{most >> 20} MiB" if most >= _KIB * _KIB else f"{most >> 10} KiB"
        raise OptionError(f"{name} is larger than {size}{cure}")
    return content
