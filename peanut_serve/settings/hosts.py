"""Addresses to listen on: whether others than this machine can reach them."""

import ipaddress

from converters.errors import OptionError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address. A name may stand for any address, except localhost."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_open(host: str, has_keys: bool) -> None:
    """Raise `OptionError` for an address that others can reach, if there is no key."""
    if not has_keys and not is_loopback(host):
        found = f"--host {host} can be reached by others"
        raise OptionError(f"{found}; give --api-key-file or --keys, or serve on 127.0.0.1")
