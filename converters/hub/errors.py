"""What huggingface_hub raises, in the words of someone who wants to fetch a model or to upload one."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from converters.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_LOG_IN = "pass --token, set HF_TOKEN, or log in: hf auth login"


@contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a `HubError` that says what to do."""
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
            f"{where} is gated: accept its licence on the Hub, then pass --token or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"no folder '{repo_id}' here and no such model on the Hub; check the name, "
            "or pass --token if it is private"
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{repo_id} has no revision '{revision}' on the Hub") from None
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"no folder '{repo_id}' here, and {where} is neither whole in the local cache nor "
            f"to be had from the Hub: {explain(error)}"
        ) from None
    except hub_exceptions() as error:
        raise HubError(f"fetching {where} from the Hub failed: {explain(error)}") from None


def hub_exceptions() -> tuple[type[Exception], ...]:
    """Everything that huggingface_hub raises when the Hub refuses, cannot be reached, or is answered by nonsense."""
    from huggingface_hub.errors import HfHubHTTPError

    # the base is HTTPError of httpx or httpx2, by version, and of broken connections, too;
    # hf_xet and the upload of several files raise RuntimeError
    return (HfHubHTTPError.__bases__[0], OSError, ValueError, RuntimeError)


def explain(error: Exception) -> str:
    """One line that says why the Hub did not do it, and what to do about that; `error` is a `hub_exceptions()`."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, OfflineModeIsEnabled):
            return "offline mode is on; unset HF_HUB_OFFLINE"
        if isinstance(cause, HfHubHTTPError):
            return _explain_answer(cause)
        if isinstance(cause, ConnectionError | HfHubHTTPError.__bases__[0]):
            return f"the Hub cannot be reached, or hung up ({_line(cause)}); check the network, then try again"
    return _line(error) + (f" ({_line(causes[-1])})" if len(causes) > 1 else "")


def _explain_answer(error: "HfHubHTTPError") -> str:
    status, has_token = error.response.status_code, "Authorization" in error.response.request.headers
    if status == 401:
        return f"the Hub {'does not know this token' if has_token else 'wants a token'} (401); {_LOG_IN}"
    if status == 403:
        told = f": {error.server_message.splitlines()[0]}" if error.server_message else ""
        return f"the Hub forbids it (403{told}); use a token with that permission"
    if status == 404:
        return "there is no such thing on the Hub (404); check the name"
    if status == 412:
        return "somebody else changed it meanwhile (412)"
    if status == 429:
        wait = re.search(r"Retry after (\d+) seconds", str(error))
        cure = f"try again {f'in {wait[1]} s' if wait else 'later'}"
        return f"the Hub takes no more requests for now (429); {cure}{'' if has_token else f'; or {_LOG_IN}'}"
    if status >= 500:
        return f"the Hub has trouble of its own ({status}); try again later"
    return _line(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _line(error: BaseException) -> str:
    return next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)
