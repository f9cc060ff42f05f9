"""Who may ask the classifiers for what: clients with one of the keys, tenants of a keys file, and its operators."""

from collections.abc import MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from peanut_serve.errors import ForbiddenError, UnauthorizedError
from peanut_serve.ray.classifiers.settings import ClassifierSettings
from peanut_serve.tenants.usage import REFUSED, USAGE
from peanut_serve.tenants.visits import Tenants, Visit
from peanut_serve.tenants.watched import KEYS_CURRENT
from peanut_serve.web.bearer import read_keys, sent_key
from peanut_serve.web.clients import Clients
from peanut_serve.web.operators import Operators

Scope = MutableMapping[str, Any]
_ARRIVING = 4096  # requests whose bodies arrive, of which a tenant gets half at most


class FrontDoor:
    """Lets requests in.

    Args:
        settings: of the fleet.

    Attributes:
        places: requests that may wait at all replicas together, of which a tenant gets half at most.

    Raises `OptionError` if a file of keys cannot be used.
    """

    def __init__(self, settings: ClassifierSettings) -> None:
        self.places: int = settings.of_front()["most_waiting"]
        watched = settings.watched_keys()
        self._operators = Operators((), watched)
        # the door lets in more than wait at the replicas: bodies arrive meanwhile
        self._clients = Clients(read_keys(settings.key_file), Tenants(watched, _ARRIVING) if watched else None)

    async def enter(self, scope: Scope) -> Visit:
        """Begin a request; leave it by `with`.

        Raises `UnauthorizedError`, `ForbiddenError` for a role that is not one of clients, `TenantLimitError`.
        """
        return await self._clients.enter(scope)

    async def enter_operator(self, scope: Scope) -> Visit:
        """Begin a request of an operator, or of a client; see `enter`."""
        try:
            self._operators.find(sent_key(scope))
        except (UnauthorizedError, ForbiddenError):
            return await self._clients.enter(scope)
        return Visit()


def metrics_page() -> bytes:
    """What tenants have used of which tasks and what they were refused, in the format that Prometheus reads."""
    registry = CollectorRegistry()
    for collector in (USAGE, REFUSED, KEYS_CURRENT):
        registry.register(collector)
    return generate_latest(registry)
