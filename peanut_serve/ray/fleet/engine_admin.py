"""The admin API of the engine of one replica, as its replica uses it."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol
from urllib.parse import quote

import httpx

Entry = dict[str, Any]
Call = Callable[[str, str, Any], Awaitable[Entry]]  # method, path, body; see `EngineReplica.call_admin`


class ThetaSource(Protocol):
    """Where θ of versions comes from that an engine does not have."""

    async def fetch(self, digest: str) -> bool:
        """Put θ of a version into the engine's state folder; False if nobody has it."""
        ...


class ChangeRefusedError(Exception):
    """The engine refused a change. Its argument is the reason."""


class EngineAdmin:
    """Looks at an engine and changes it.

    Args:
        call: calls its admin API.
        theta: where missing versions come from.
    """

    def __init__(self, call: Call, theta: ThetaSource) -> None:
        self._call, self._theta = call, theta

    async def look(self, name: str) -> Entry | None:
        """The status of a variant; None if there is none. Raises `ChangeRefusedError` if the engine does not tell."""
        return await self._found(path_of(name))

    async def release(self, name: str) -> Entry | None:
        """The latest release of a variant; None if there is none. Raises as `look`."""
        return await self._found(release_path(name))

    async def _found(self, path: str) -> Entry | None:
        entry = await self._call("GET", path, None)
        return None if entry["status"] == httpx.codes.NOT_FOUND else checked(entry)

    async def do(self, method: str, path: str, body: Any = None) -> Any:
        """Make a change. Raises `ChangeRefusedError`."""
        return checked(await self._call(method, path, body))

    async def with_theta(self, path: str, body: Any, digest: str) -> Entry:
        """The engine's answer to a change that needs a version; its θ comes from another replica if need be."""
        entry = await self._call("POST", path, body)
        if entry["status"] == httpx.codes.UNPROCESSABLE_ENTITY and await self._theta.fetch(digest):
            entry = await self._call("POST", path, body)
        return entry

    async def hold(self, name: str) -> Entry | None:
        """Hold a name at the version of its files, if they can be read. Returns its status. Raises as `look`."""
        await self._call("POST", f"{release_path(name)}/hold", None)
        return await self.look(name)

    async def roll_back(self, name: str, digest: str) -> Entry:
        """Roll back to a version and hold it. The engine's answer."""
        return await self.with_theta(f"{path_of(name)}/rollback", {"digest": digest, "hold": True}, digest)

    async def stage(self, name: str, source: str, digest: str | None) -> Any:
        """Stage the version of an entry, with a digest that one. Raises `ChangeRefusedError`."""
        path, body = f"{release_path(name)}/stage", {"source": source, "digest": digest}
        if digest is None:
            return await self.do("POST", path, body)
        return checked(await self.with_theta(path, body, digest))


def checked(entry: Entry) -> Any:
    """The answer of an engine. Raises `ChangeRefusedError` if it is a refusal."""
    answer = entry.get("answer")
    if 200 <= entry["status"] < 300:
        return answer
    told = answer.get("error", {}).get("message") if isinstance(answer, dict) else None
    raise ChangeRefusedError(told or entry.get("error") or f"the engine answered {entry['status']}")


def path_of(name: str) -> str:
    """Where the admin API of an engine has a variant: always one segment."""
    return "/variants/" + _segment(name)


def release_path(name: str) -> str:
    """Where the admin API of an engine has the release of a variant."""
    return "/releases/" + _segment(name)


def _segment(name: str) -> str:
    return quote(name, safe="").replace(".", "%2E")
