"""Readable messages for the errors of huggingface_hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from converters.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_LOG_IN = "pass token=, set HF_TOKEN, or log in: hf auth login"


@contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Convert errors of huggingface_hub to a `HubError` that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repo_id}@{revision}" if revision else repo_id
    try:
        yield
    except GatedRepoError:
        raise HubError(
            f"{where} is gated: accept its licence on the Hub, then pass a token or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"no folder '{repo_id}' here and no such model on the Hub; check the name, "
            "or pass token= if it is private"
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{repo_id} has no revision '{revision}' on the Hub") from None
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"no folder '{repo_id}' here, and {where} is neither complete in the local cache nor "
            f"available from the Hub: {explain(error)}"
        ) from None
    except hub_exceptions() as error:
        raise HubError(f"fetching {where} from the Hub failed: {explain(error)}") from None


def hub_exceptions() -> tuple[type[Exception], ...]:
    """The exceptions of huggingface_hub if the Hub refuses, cannot be reached, or sends an invalid response."""
    from huggingface_hub.errors import HfHubHTTPError

    # the base class is HTTPError of httpx or httpx2, depending on the version, and also covers broken connections;
    # hf_xet and uploads of several files raise RuntimeError
    return (HfHubHTTPError.__bases__[0], OSError, ValueError, RuntimeError)


def explain(error: Exception) -> str:
    """One line that says why the Hub call failed and what to do; `error` is one of `hub_exceptions()`."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, OfflineModeIsEnabled):
            return "offline mode is on; unset HF_HUB_OFFLINE"
        if isinstance(cause, HfHubHTTPError):
            return _explain_answer(cause)
        if isinstance(cause, ConnectionError | HfHubHTTPError.__bases__[0]):
            return f"the Hub cannot be reached or closed the connection ({_line(cause)}); check the network and retry"
    return _line(error) + (f" ({_line(causes[-1])})" if len(causes) > 1 else "")


def _explain_answer(error: "HfHubHTTPError") -> str:
    status, has_token = error.response.status_code, "Authorization" in error.response.request.headers
    if status == 401:
        return f"the Hub {'rejected this token' if has_token else 'requires a token'} (401); {_LOG_IN}"
    if status == 403:
        detail = f": {error.server_message.splitlines()[0]}" if error.server_message else ""
        return f"the Hub denied access (403{detail}); use a token with this permission"
    if status == 404:
        return "not found on the Hub (404); check the name"
    if status == 412:
        return "someone else changed it in the meantime (412)"
    if status == 429:
        wait = re.search(r"Retry after (\d+) seconds", str(error))
        retry = f"try again {f'in {wait[1]} s' if wait else 'later'}"
        return f"the rate limit of the Hub was reached (429); {retry}{'' if has_token else f'; or {_LOG_IN}'}"
    if status >= 500:
        return f"the Hub reported a server error ({status}); try again later"
    return _line(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _line(error: BaseException) -> str:
    return next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)
