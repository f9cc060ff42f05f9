"""Errors as HTTP responses, in OpenAI's form."""

import json
from collections.abc import MutableMapping
from typing import Any

from converters.errors import PeanutError
from peanut_serve.errors import (
    BodiesFullError,
    RequestTimeoutError,
    RequestTooLargeError,
    ServingError,
    TenantLimitError,
    TryLaterError,
)

Message = MutableMapping[str, Any]


def refusal_messages(error: PeanutError, headers: list[tuple[bytes, bytes]]) -> list[Message]:
    """A response that reports an error."""
    status = status_of(error)
    headers = [(b"content-type", b"application/json"), *headers]
    if isinstance(error, TryLaterError):
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if isinstance(error, TenantLimitError):
        headers.extend(error.headers)
    if isinstance(error, RequestTooLargeError | RequestTimeoutError | BodiesFullError):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": json.dumps(error_body(error, status)).encode()},
    ]


def status_of(error: PeanutError) -> int:
    """HTTP status of an error's response."""
    return error.status if isinstance(error, ServingError) else 500


def error_body(error: PeanutError, status: int) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = type(error).__name__
    return {"error": {"message": str(error), "type": kind, "param": "model", "code": status}}
