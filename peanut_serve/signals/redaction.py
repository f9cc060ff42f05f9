"""Keys that clients put into URLs by mistake, and that no access log may have."""

import logging
import re

_PATH = 2  # of the arguments of uvicorn's access log: client, method, path with query, HTTP version, status
_VALUE = re.compile(r"=[^&]*")
_KEY = re.compile(r"\bpeanut_[A-Za-z0-9_-]{20,}")  # as `peanut-serve key` makes them


class WithoutKeys(logging.Filter):
    """Hides what stands for values in the queries of URLs, and keys wherever they are, in uvicorn's access log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, as it may be shown."""
        arguments = record.args
        if isinstance(arguments, tuple) and len(arguments) > _PATH:
            path = arguments[_PATH]
            hidden = without_keys(path) if isinstance(path, str) else path
            record.args = (*arguments[:_PATH], hidden, *arguments[_PATH + 1 :])
        return True


def without_keys(path: str) -> str:
    """A path with its query, as a log may have it: `/v1/models?api_key=***`."""
    path, mark, query = path.partition("?")
    hidden = "&".join(_VALUE.sub("=***", part) if "=" in part else "***" for part in query.split("&"))
    return _KEY.sub("peanut_***", path + mark + (hidden if query else ""))


def hide_keys() -> None:
    """Hide keys in the access log of this process from now on, whatever configures its handlers later."""
    logger = logging.getLogger("uvicorn.access")
    if not any(isinstance(one, WithoutKeys) for one in logger.filters):
        logger.addFilter(WithoutKeys())
