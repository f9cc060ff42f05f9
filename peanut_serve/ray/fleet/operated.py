"""What a replica does for the operators of a fleet, by the admin API of its engine."""

import asyncio
from typing import Any

import httpx

from peanut_serve.ray.fleet.engine_admin import path_of, release_path
from peanut_serve.ray.fleet.replay import Replay
from peanut_serve.ray.fleet.wanted import WantedState
from peanut_serve.ray.state import StateFolder
from peanut_serve.variants.kept_theta import has_theta, read_theta

_FOREVER = httpx.Timeout(5.0, read=None)  # seconds; an answer takes as long as it takes

Answer = dict[str, Any]


class OperatedReplica:
    """The part of `EngineReplica` that operators use. Every method returns the name of the replica as `replica`.

    Attributes:
        name: of the replica.
    """

    name: str
    _admin: httpx.AsyncClient
    _replay: Replay
    _resident: tuple[str, ...]
    _state: StateFolder

    async def call_admin(self, method: str, path: str, body: Any = None) -> Answer:
        """Status and JSON of an answer of the engine's admin API."""
        try:
            answer = await self._admin.request(method, path, json=body, timeout=_FOREVER)
        except httpx.HTTPError as error:
            return {"replica": self.name, "status": 503, "error": f"the engine did not answer: {error!r}"}
        try:
            found = answer.json() if answer.content else None
        except ValueError:  # of a failure that the API did not foresee
            status = max(answer.status_code, httpx.codes.INTERNAL_SERVER_ERROR)
            return {"replica": self.name, "status": status, "error": "the engine's answer is not JSON"}
        return {"replica": self.name, "status": answer.status_code, "answer": found}

    async def report(self) -> Answer:
        """The state of its engine, what is resident, and the digest of each name."""
        engine = await self.call_admin("GET", "/engine")
        variants = await self.call_admin("GET", "/variants")
        if (status := max(engine["status"], variants["status"])) != httpx.codes.OK:
            return {"replica": self.name, "status": status, "engine": engine.get("answer")}
        return {
            "replica": self.name,
            "status": status,
            "engine": engine["answer"],
            "resident": list(self._resident),
            "digests": {one["name"]: one["digest"] for one in variants["answer"]},
            "withheld": self._replay.withheld,
            "unpinned": self._replay.unpinned,
            "revision": self._replay.state.revision,
        }

    async def variants(self) -> Answer:
        """The engine's variants, and those that are withheld, with the reasons."""
        return {**await self.call_admin("GET", "/variants"), "withheld": self._replay.withheld}

    async def releases(self) -> Answer:
        """The engine's releases, and what is withheld, with the reasons."""
        return {**await self.call_admin("GET", "/releases"), "withheld": self._replay.withheld}

    async def hold_first(self, name: str) -> Answer:
        """Hold a variant at the version that it has here, and return its status."""
        held = await self._do_first(name, "hold")
        return held if held["status"] >= httpx.codes.BAD_REQUEST else await self.call_admin("GET", path_of(name))

    async def stage_first(self, name: str, staging: Answer) -> Answer:
        """Stage a version from files, for others to stage the same one. What nobody wants is ended before."""
        await self._replay.settle([name])
        if (reason := self._replay.withheld.get(name)) is not None:
            error = {"type": "ReleaseError", "message": f"{name} is not as it is wanted: {reason}"}
            return {"replica": self.name, "status": httpx.codes.CONFLICT, "answer": {"error": error}}
        return await self._do_first(name, "stage", staging)

    async def _do_first(self, name: str, verb: str, body: Any = None) -> Answer:
        """A step of a release that the other replicas follow, unless it was refused here."""
        is_refused = False
        try:
            entry = await self.call_admin("POST", f"{release_path(name)}/{verb}", body)
            is_refused = httpx.codes.is_client_error(entry["status"])
            return entry
        finally:
            if not is_refused:
                self._replay.note_first(name)

    async def roll_back(self, name: str, digest: str) -> Answer:
        """Roll a variant back to a version, which may come from another replica."""
        return await self._replay.roll_back(name, digest)

    async def adopt(self, wanted: Answer, name: str, done: list[str]) -> Answer:
        """Follow what operators want after a change of a variant, which the replicas in `done` have made.

        Returns as `call_admin` what this one has then.
        """
        state = WantedState.model_validate(wanted)
        await self._replay.follow(state, self.name in done)
        if (reason := self._replay.reason(name)) is not None:
            return {"replica": self.name, "status": 503, "error": reason}
        if state.variants[name].removed:
            return {"replica": self.name, "status": 204, "answer": None}
        return await self.call_admin("GET", path_of(name))

    async def has_version(self, digest: str) -> Answer:
        """Whether the engine's state folder has θ of a version."""
        return {"replica": self.name, "has": has_theta(self._state.path, digest)}

    async def send_version(self, digest: str, holder: str) -> Answer:
        """The files of θ of a version, if this replica is the `holder`."""
        if holder != self.name:
            return {"replica": self.name}
        return {"replica": self.name, "files": await asyncio.to_thread(read_theta, self._state.path, digest)}
