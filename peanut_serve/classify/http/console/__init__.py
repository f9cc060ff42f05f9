"""The console of a server of classifiers: what it shows of tasks, and what people can do with them.

Login, guard, style and behaviour are those of `peanut_serve.web.console`, of which it is another page.
"""

from dataclasses import dataclass

from peanut_serve.web.audit import AuditLog
from peanut_serve.web.operators import Operators


@dataclass(frozen=True)
class TaskConsole:
    """Where a console is, and who may use it.

    Attributes:
        key: the admin key, or who has which.
        port: of the server.
        hosts: names by which browsers reach it, besides loopback and addresses.
        audit: gets a line for each action; without it, only the server's log does.
    """

    key: str | Operators
    port: int
    hosts: tuple[str, ...] = ()
    audit: AuditLog | None = None
