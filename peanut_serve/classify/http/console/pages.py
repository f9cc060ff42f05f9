"""What the pages show of a server of tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peanut_serve.classify.serving.metrics import Traffic
from peanut_serve.classify.serving.server import TaskServer
from peanut_serve.classify.serving.sessions import OpenFacts
from peanut_serve.classify.serving.version import TaskVersion
from peanut_serve.errors import UnknownVariantError, shown
from peanut_serve.web.console.live_pages import LivePages, Part, parts_of, size

Verb = Literal["open", "close", "reload"]
LABELS: dict[Verb, str] = {"open": "Open", "close": "Close", "reload": "Reload"}
_TITLES = {"server": "Server", "tasks": "Tasks", "memory": "Memory", "batches": "Batches", "traffic": "Requests"}


@dataclass(frozen=True)
class TaskRow:
    """A task as the page shows it.

    Attributes:
        name: in requests.
        version: that was last found; None before the first request.
        open: what is open of it.
        error: why it cannot be opened.
        waiting: inputs that wait for a run.
        traffic: what was asked so far.
        verbs: what can be done with it.
    """

    name: str
    version: TaskVersion | None
    open: OpenFacts | None
    error: str | None
    waiting: int
    traffic: Traffic
    verbs: Sequence[Verb]

    @property
    def state(self) -> str:
        """In a word, which is also a class of the style sheet."""
        return "failed" if self.error else "open" if self.open else "closed"


class TaskPages(LivePages):
    """What a server of tasks shows.

    Args:
        server: the server.
    """

    def __init__(self, server: TaskServer) -> None:
        super().__init__(_TITLES, {"labels": LABELS}, "peanut_serve.classify.http.console")
        self._server = server

    def rows(self) -> list[TaskRow]:
        """Every task, from what is known of it: no file is read."""
        opened = {one.version.name: one for one in self._server.sessions.facts()}
        waiting, traffic = self._server.queue(), self._server.metrics.traffic
        return [
            _row(name, version, opened.get(name), waiting.get(name, 0), traffic.get(name, Traffic()))
            for name, version in self._server.library.found().items()
        ]

    def row(self, name: str) -> TaskRow:
        """A task. Raises `UnknownVariantError`."""
        found = next((one for one in self.rows() if one.name == name), None)
        if found is None:
            raise UnknownVariantError(f"there is no task {shown(name)}")
        return found

    async def names(self) -> list[str]:
        """All tasks."""
        return list(self._server.library.found())

    async def facts(self) -> dict[str, Any]:
        """What the sections show now."""
        server, rows = self._server, self.rows()
        opened = server.sessions.facts()
        return {
            "ready": server.is_ready,
            "waiting": server.waiting,
            "graphs": server.sessions.open_graphs,
            "evictions": server.sessions.evictions,
            "nbytes": server.sessions.nbytes,
            "limits": server.limits,
            "rows": rows,
            "answered": sum(row.traffic.answered for row in rows),
            "failed": sum(row.traffic.failed for row in rows),
            "opened": opened,
            "bar": _bar(opened, server.limits.memory),
        }

    def dialog(self, verb: Verb, name: str) -> str:
        """What is asked before an action. Raises `UnknownVariantError`."""
        row = self.row(name)
        return self.render("dialog.html", verb=verb, row=row, costs=_costs(verb, row))


def _row(name: str, version: TaskVersion | None, opened: OpenFacts | None, waiting: int, traffic: Traffic) -> TaskRow:
    error = str(version.failure[0]) if version is not None and version.failure else None
    verbs: list[tuple[Verb, bool]] = [
        ("open", opened is None and error is None),
        ("close", opened is not None),
        ("reload", version is not None),
    ]
    return TaskRow(
        name, version, opened, error, waiting, traffic, [verb for verb, is_possible in verbs if is_possible]
    )


def _bar(opened: Sequence[OpenFacts], limit: int) -> list[Part]:
    """Graphs, and the adapters that are open on them."""
    graphs = {one.version.graph: one.version.graph_bytes for one in opened}
    names = {graph: [one.version.name for one in opened if one.version.graph == graph] for graph in graphs}
    used = {one.version.graph for one in opened if one.uses}
    sizes = [
        (f"graph of {', '.join(names[graph][:5])}: {size(nbytes)}", "stays" if graph in used else "frees", nbytes)
        for graph, nbytes in graphs.items()
    ]
    sizes += [
        (f"adapter of {one.version.name}: {size(one.version.adapter_bytes)}", "stays" if one.uses else "frees",
         one.version.adapter_bytes)
        for one in opened
        if one.version.adapter_bytes
    ]  # fmt: skip
    return parts_of(sizes, limit)


def _costs(verb: Verb, row: TaskRow) -> list[str]:
    """What an action costs, and what it does, in sentences."""
    if verb == "open":
        found = [
            "Its files are compared with their hashes and opened, which takes seconds. Others are answered meanwhile."
        ]
        if row.version is not None:
            needed = row.version.graph_bytes + row.version.adapter_bytes
            found.append(
                f"It needs {size(needed)} at most. If that is more than is left of --memory, what was not used for "
                "longest is closed."
            )
        return found
    if verb == "close":
        frees = row.open.frees if row.open is not None else 0
        shares = row.open.shares if row.open is not None else ()
        found = [f"This frees {size(frees)}. Its next request opens it again, and waits for that."]
        if shares:
            found.append(
                f"Its graph stays open for {', '.join(shares[:5])}{' and others' if len(shares) > 5 else ''}."
            )
        if row.open is not None and row.open.uses:
            found.append(f"{row.open.uses} requests use it now: it cannot be closed before they are answered.")
        return found
    return [
        "Its files are read again, even if they seem not to have changed, and compared with their hashes.",
        "Requests that have begun keep what they have; those after them wait until it is open.",
    ]
