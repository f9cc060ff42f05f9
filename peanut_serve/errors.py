"""Errors of a server of variants, each with the HTTP status of its response.

PeanutError (see converters.errors)
├── ServingError
│   ├── RequestBodyError        400: the body does not name a variant, or asks for what cannot be served
│   ├── UnauthorizedError       401: the API key is missing or wrong
│   ├── ForbiddenError          403: the API key is not for this
│   ├── RouteRefusedError       404: this route is not served
│   ├── RequestTimeoutError     408: the body did not arrive in time
│   ├── RequestTooLargeError    413: the body is larger than the limit
│   ├── UnknownVariantError     404: no variant has this name, or no version has this digest
│   ├── VariantInUseError       409: a variant with requests, or a pinned or active one, cannot be removed
│   ├── VariantNameError        409: the name is already used, or not allowed
│   ├── ReleaseError            409: the state of the release does not allow this
│   ├── VariantError            422: it cannot be evaluated, or does not fit the running model
│   ├── NotAdmittedError        500: a request reached the engine without the weights that it needs
│   ├── SwapError               500: the swap failed; the previous weights were restored
│   └── TryLaterError           the response has a Retry-After header
│       ├── BeingWrittenError   503: its files are still being written
│       ├── EngineDownError     503: the engine is restarting, or cannot be started
│       │   └── EngineLostError     503: the engine of a fleet that answered the request died
│       ├── TenantLimitError    429: the owner of the API key has sent too many requests
│       └── QueueFullError      429: too many requests are waiting
│           └── BodiesFullError     429: there is no memory for the body of another request
├── EngineStartError            the command `peanut-serve`: vLLM could not start its engine
└── AdminRequestError           `peanut-serve ctl`: the admin API did not respond, or rejected the request
"""

from collections.abc import Sequence
from typing import ClassVar

from converters.errors import PeanutError

_SHOWN = 80  # characters of what a client sent


def shown(text: str) -> str:
    """What a client sent, for messages and logs: on one line, without control characters, and cut."""
    cut = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return cut if cut.isprintable() else ascii(cut)


class ServingError(PeanutError):
    """Base class of the errors that are reported to a client of the server.

    Attributes:
        status: HTTP status of the response.
    """

    status: ClassVar[int] = 500


class RequestBodyError(ServingError):
    """The body does not name a variant, or asks for what cannot be served."""

    status = 400


class UnauthorizedError(ServingError):
    """The API key is missing or wrong."""

    status = 401


class ForbiddenError(ServingError):
    """The API key is known, but not for this variant or route."""

    status = 403


class RouteRefusedError(ServingError):
    """This route is not served."""

    status = 404


class RequestTimeoutError(ServingError):
    """The body did not arrive in time."""

    status = 408


class RequestTooLargeError(ServingError):
    """The body is larger than the limit."""

    status = 413


class UnknownVariantError(ServingError):
    """No variant has this name, or no version of it has this digest."""

    status = 404


class VariantInUseError(ServingError):
    """The variant cannot be removed now."""

    status = 409


class VariantNameError(ServingError):
    """The name is already used, or not allowed."""

    status = 409


class ReleaseError(ServingError):
    """The state of the release does not allow this."""

    status = 409


class VariantError(ServingError):
    """The variant cannot be evaluated, or does not fit the running model."""

    status = 422


class NotAdmittedError(ServingError):
    """A request reached the engine without the weights that it needs."""


class SwapError(ServingError):
    """The swap failed and was rolled back."""


class TryLaterError(ServingError):
    """The request cannot be served now; it may succeed later.

    Args:
        message: the reason.
        retry_after: seconds after which the client should try again.
    """

    status = 503

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDownError(TryLaterError):
    """The engine is restarting, or cannot be started."""


class EngineLostError(EngineDownError):
    """The engine of a fleet that answered the request died, maybe because of it."""


class BeingWrittenError(TryLaterError):
    """The files of a variant are still being written."""


class QueueFullError(TryLaterError):
    """Too many requests are waiting."""

    status = 429


class BodiesFullError(QueueFullError):
    """The bodies of other requests take all the memory that they may."""


class TenantLimitError(TryLaterError):
    """The owner of the API key has sent too many requests, or has too many in the server.

    Args:
        message, retry_after: see `TryLaterError`.
        headers: of the answer besides, with what the owner may send.
    """

    status = 429

    def __init__(self, message: str, retry_after: int = 1, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(message, retry_after)
        self.headers = tuple(headers)


class EngineStartError(PeanutError):
    """vLLM could not start its engine."""


class AdminRequestError(PeanutError):
    """The admin API did not respond, or rejected the request."""
