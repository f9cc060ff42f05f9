"""Who sends a request for variants: a client with one of the server's keys, or a tenant of the keys file."""

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from peanut_serve.errors import RouteRefusedError, UnauthorizedError, shown
from peanut_serve.tenants.keys import OTHERS
from peanut_serve.tenants.visits import TENANT_HEADER, Tenants, Visit, refused
from peanut_serve.web.bearer import BearerKeys, sent_key
from peanut_serve.web.request_body import Scope
from peanut_serve.web.routes import Access, refusal_of

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Clients:
    """Lets requests in.

    Args:
        keys: of clients without limits of their own.
        tenants: of the keys file, if there is one. Without both, no key is needed.
        is_behind_front: whether all clients are a fleet's front, which says whose requests they are.
    """

    def __init__(
        self, keys: Sequence[str] = (), tenants: Tenants | None = None, is_behind_front: bool = False
    ) -> None:
        self._keys, self._tenants = BearerKeys(keys) if keys else None, tenants
        self._is_behind_front = is_behind_front

    async def enter(self, scope: Scope) -> Visit:
        """Begin a request; leave it by `with`. A key that is in the file as well has the limits of the file.

        Raises `UnauthorizedError`, `ForbiddenError` for a key of operators, `TenantLimitError`.
        """
        if self._keys is None and self._tenants is None:
            return Visit()
        try:
            if self._tenants is not None:
                return await self._tenants.enter(sent_key(scope))
        except UnauthorizedError:
            pass  # it may be one of the other keys
        if self._keys is not None and self._keys.include(scope):
            told = dict(scope["headers"]).get(TENANT_HEADER) if self._is_behind_front else None
            return Visit(label=told.decode("latin-1")) if told else Visit()
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        raise refused(OTHERS, "key", UnauthorizedError(message))


def telling_rate(send: Send, visit: Visit) -> Send:
    """Sends an answer with what its tenant may send besides; see `Visit.rate_headers`."""
    if not visit.rate_headers():
        return send

    async def sending(message: MutableMapping[str, Any]) -> None:
        """Add the headers, as they are when the answer begins."""
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *visit.rate_headers()]}
        await send(message)

    return sending


def check_route(scope: Scope, path: str, access: Access, visit: Visit) -> None:
    """Raise `RouteRefusedError`, and `ForbiddenError` for what acts on the requests of all clients, or tells of them.

    Such a route names no variant, by which a tenant could be let in.
    """
    if access is Access.REFUSED:
        reason = refusal_of(path) or "peanut-serve does not know this route"
        raise RouteRefusedError(f"{scope['method']} {shown(path)} is not served: {reason}")
    if access is Access.KEYED and visit.is_tenant:
        raise visit.forbid(f"{scope['method']} {shown(path)}, which is for a key of --api-key")
