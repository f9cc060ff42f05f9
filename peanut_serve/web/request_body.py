"""What the middleware reads from a request: its id, its body, and the variant that it names."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from peanut_serve.errors import BodiesFullError, RequestBodyError, RequestTimeoutError, RequestTooLargeError, shown
from peanut_serve.tenants.visits import Visit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

Take = Callable[[int], None]

LARGEST = 16  # as many bodies of the largest size may be in memory
_ADAPTER_HEADER = b"x-amzn-sagemaker-adapter-identifier"  # on /invocations, vLLM takes `model` from it
SESSION_HEADER = b"x-session"


@dataclass(frozen=True)
class ClientLimits:
    """What one client may take.

    Attributes:
        body_bytes: size of a body.
        body_seconds: until a body has arrived.
        stall_seconds: for which a client may read nothing of its response.
    """

    body_bytes: int = 64 << 20
    body_seconds: float = 60.0
    stall_seconds: float = 30.0


class Bodies:
    """Counts the bytes of bodies. For one event loop.

    Args:
        largest: size that one body may have.
    """

    def __init__(self, largest: int) -> None:
        self._most, self.taken = LARGEST * largest, 0

    @contextmanager
    def share(self) -> Iterator[Take]:
        """What one body takes, until it is not needed any more.

        Call what is yielded with the size of each part. It raises `BodiesFullError` if there is no room for it.
        """
        own = 0

        def take(size: int) -> None:
            nonlocal own
            own += size
            self.taken += size
            if self.taken > self._most:
                raise BodiesFullError("the bodies of other requests take all the memory that they may")

        try:
            yield take
        finally:
            self.taken -= own


async def read_body(receive: Receive, limits: ClientLimits, take: Take) -> bytes | None:
    """Read a request's body; None if the client disconnected before it was complete.

    Args:
        receive: of the request.
        limits: of its client.
        take: see `Bodies.share`.

    Raises `RequestTimeoutError`, `RequestTooLargeError`, and what `take` raises.
    """
    try:
        return await asyncio.wait_for(_received(receive, limits.body_bytes, take), limits.body_seconds)
    except asyncio.TimeoutError:
        raise RequestTimeoutError(f"the request's body did not arrive within {limits.body_seconds:.0f} s") from None


async def _received(receive: Receive, most_bytes: int, take: Take) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most_bytes:
            raise RequestTooLargeError(f"the request's body is larger than {most_bytes >> 20} MiB; see --max-body")
        take(len(parts[-1]))
        if not message.get("more_body"):
            return b"".join(parts)


def request_id(scope: Scope) -> str:
    """The client's X-Request-Id, or a new id that vLLM then uses as well."""
    for key, value in scope["headers"]:
        if key == b"x-request-id":
            return str(value.decode("latin-1"))
    made = uuid4().hex
    scope["headers"] = [*scope["headers"], (b"x-request-id", made.encode())]
    return made


def parse_body(body: bytes) -> dict[str, Any]:
    """The body as a JSON object; empty for other JSON. Raises `RequestBodyError` if it is not JSON."""
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise RequestBodyError(
            "the body is not valid JSON, so the variant is unknown; send JSON with the variant's name in model"
        ) from None
    return value if isinstance(value, dict) else {}


def variant_of(value: dict[str, Any], scope: Scope) -> str | None:
    """The variant that the request names in `model`; None if it names none.

    On /invocations, vLLM takes the name from a header alone: the name that is found is put there.
    """
    name = value.get("model")
    if name is not None and not isinstance(name, str):
        raise RequestBodyError(f"model is a JSON {type(name).__name__}; expected the name of a variant")
    if not scope["path"].endswith("/invocations"):
        return name
    given = next((header.decode("latin-1") for key, header in scope["headers"] if key == _ADAPTER_HEADER), None)
    if name and given and name != given:
        raise RequestBodyError(
            f"model is {shown(name)}, but the header X-Amzn-SageMaker-Adapter-Identifier is {shown(given)}; "
            "send the same name, or only one of them"
        )
    name = name or given
    headers = [(key, header) for key, header in scope["headers"] if key != _ADAPTER_HEADER]
    scope["headers"] = [*headers, (_ADAPTER_HEADER, name.encode())] if name else headers
    return name


def session_of(value: dict[str, Any], scope: Scope) -> str | None:
    """What groups requests that one version of a variant has to answer: `user`, or else the header X-Session."""
    if isinstance(user := value.get("user"), str) and user:
        return user
    return next((header.decode("latin-1") for key, header in scope["headers"] if key == SESSION_HEADER), None)


def check_lifetime(value: dict[str, Any]) -> None:
    """Refuse a request that would go on after its response: by then, the engine may have other weights."""
    if value.get("background"):
        raise RequestBodyError(
            "background is set: a response that is generated in the background would outlive its request, and with "
            "it the weights of its variant; send the request without background, or with stream"
        )


def check_own(value: dict[str, Any], visit: Visit) -> None:
    """Refuse a request of a tenant that goes on from a stored response: these are not kept apart by tenants."""
    if visit.is_tenant and value.get("previous_response_id"):
        raise visit.forbid("previous_response_id: stored responses are those of all clients; send the messages again")
