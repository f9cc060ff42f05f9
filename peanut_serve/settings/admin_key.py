"""The key of the admin API."""

from converters.errors import OptionError

KEY_VARIABLE = "PEANUT_ADMIN_KEY"


def checked_key(key: str, where: str) -> str:
    """A key of the admin API, without the line's end it has in a file.

    Raises `OptionError` for one that no HTTP header can carry; the message has no part of the key in it.
    """
    key = key.strip()
    if not key:
        raise OptionError(f"the admin key in {where} is empty")
    if not key.isprintable():
        raise OptionError(f"the admin key in {where} must be one line of printable characters")
    return key
