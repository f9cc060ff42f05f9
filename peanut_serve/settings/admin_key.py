"""The key of the admin API."""

from converters.errors import OptionError

KEY_VARIABLE = "PEANUT_ADMIN_KEY"


def checked_key(key: str, where: str) -> str:
    """Check a key of the admin API, and remove surrounding whitespace, such as the newline at the end of a file.

    Raises `OptionError` if an HTTP header cannot contain the key. The message includes no part of the key.
    """
    key = key.strip()
    if not key:
        raise OptionError(f"the admin key in {where} is empty")
    if not key.isprintable():
        raise OptionError(f"the admin key in {where} must be one line of printable characters")
    return key
