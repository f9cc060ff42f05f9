"""Every refusal of a server that swaps variants, each with the HTTP status that it is answered with.

PeanutError (see converters.errors)
├── ServingError
│   ├── UnknownVariantError     404: no variant has the name, or no version the digest
│   ├── VariantInUseError       409: it cannot be removed while it has requests, or is pinned or active
│   ├── VariantNameError        409: the name is taken, or not allowed
│   ├── VariantError            422: it cannot be evaluated, or the running model has no place for it
│   ├── SwapError               500: the swap failed; the engine has the weights it had before
│   └── TryLaterError           answered with Retry-After
│       ├── EngineDownError     503: the engine restarts, or is lost
│       └── QueueFullError      429: too many requests wait
└── AdminRequestError           `peanut-serve ctl` got no answer, or a refusal
"""

from typing import ClassVar

from converters.errors import PeanutError


class ServingError(PeanutError):
    """Base class of what a client of the server is told.

    Attributes:
        status: of the HTTP answer.
    """

    status: ClassVar[int] = 500


class UnknownVariantError(ServingError):
    """No variant has this name, or no version of it this digest."""

    status = 404


class VariantInUseError(ServingError):
    """The variant cannot be removed now."""

    status = 409


class VariantNameError(ServingError):
    """The name is taken, or not allowed."""

    status = 409


class VariantError(ServingError):
    """The variant cannot be evaluated, or the running model has no place for it."""

    status = 422


class SwapError(ServingError):
    """The swap failed and was rolled back."""


class TryLaterError(ServingError):
    """What was asked for may work later.

    Args:
        message: what is wrong now.
        retry_after: seconds after which it is worth asking again.
    """

    status = 503

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDownError(TryLaterError):
    """The engine restarts, or is lost."""


class QueueFullError(TryLaterError):
    """Too many requests wait for this variant, or for all."""

    status = 429


class AdminRequestError(PeanutError):
    """The admin API did not answer, or refused."""
