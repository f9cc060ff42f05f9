"""The admin API of a fleet: what every replica has, whether they agree, and changes that go to all of them.

    GET    /admin/v1/fleet                          every replica: its engine, and the digest of each name
    POST   /admin/v1/variants                       to all replicas, as the following ones
    DELETE /admin/v1/variants/NAME
    POST   /admin/v1/variants/NAME/{reload,rollback,pin,unpin}
    POST   /admin/v1/variants/NAME/activate         to one replica

An answer of all has an entry per replica. Its status is 200 if every replica did it and they have the same digest
now; the one of the replicas if all refuse alike; otherwise 207: read the entries.
"""

import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from peanut_serve.ray.replica import EngineReplica
from peanut_serve.web.bearer import BearerKeys

PREFIX = "/admin/v1"
_TO_ALL = {
    "POST": re.compile(r"/variants(/.+/(reload|rollback|pin|unpin))?"),
    "DELETE": re.compile(r"/variants/.+"),
}
_TO_ONE = re.compile(r"/variants/(?P<name>.+)/activate")
_LONGEST = 3600.0  # seconds; variants are evaluated
_GLANCE = 10.0  # seconds, for what is known already

Entry = dict[str, Any]


class FleetAdmin:
    """Answers the requests of operators at the front."""

    def __init__(self, engines: DeploymentHandle[EngineReplica], keys: Sequence[str]) -> None:
        self._engines, self._keys = engines, BearerKeys(keys)

    async def answer(self, request: Request) -> Response:
        """Answer a request for a path below `PREFIX`."""
        if not self._keys.include(request.scope):
            return _refusal(401, "the admin key is missing or wrong; send it as Authorization: Bearer KEY")
        try:
            return await self._answer(request, request.method, request.url.path.removeprefix(PREFIX))
        except TimeoutError:
            return _refusal(504, "a replica took too long to answer; GET /admin/v1/fleet shows what they have")
        except (RayError, RayServeException) as error:
            return _refusal(503, f"no replica is ready ({type(error).__name__})")

    async def _answer(self, request: Request, method: str, path: str) -> Response:
        if method == "GET" and path == "/fleet":
            return _fleet(await self._broadcast("report", within=_GLANCE))
        try:
            body = json.loads(await request.body() or b"null")
        except ValueError as error:
            return _refusal(422, f"the body is not JSON: {error}")
        target = quote(path) + (f"?{request.url.query}" if request.url.query else "")
        if method == "POST" and (found := _TO_ONE.fullmatch(path)):
            return await self._to_one(found["name"], target)
        if method in _TO_ALL and _TO_ALL[method].fullmatch(path):
            return of_all(await self._broadcast("call_admin", method, target, body, within=_LONGEST))
        return _refusal(404, f"{method} {request.url.path} is not served by a fleet")

    async def _broadcast(self, method: str, *arguments: Any, within: float) -> list[Entry]:
        answers = await self._engines.broadcast(method, *arguments).results_async(
            timeout_s=within, return_exceptions=True
        )
        entries = [_lost(answer) if isinstance(answer, BaseException) else answer for answer in answers]
        return sorted(entries, key=lambda entry: str(entry["replica"]))

    async def _to_one(self, name: str, target: str) -> Response:
        try:
            entry = await self._engines.options(method_name="call_admin", multiplexed_model_id=name).remote(
                "POST", target, None
            )
        except (RayError, RayServeException) as error:
            entry = _lost(error)
        return JSONResponse(entry, entry["status"])


def _fleet(entries: Sequence[Entry]) -> Response:
    names = sorted({name for entry in entries for name in entry.get("digests", {})})
    told = {name: {entry.get("digests", {}).get(name) for entry in entries} for name in names}
    disputed = [name for name in names if len(told[name] - {None}) > 1]
    agree = not disputed and all(entry["status"] == 200 for entry in entries)
    return JSONResponse({"agree": agree, "disputed": disputed, "replicas": entries})


def of_all(entries: Sequence[Entry]) -> Response:
    """The answer to a change that went to all replicas."""
    statuses = {entry["status"] for entry in entries}
    digests = {entry["answer"].get("digest") for entry in entries if isinstance(entry.get("answer"), dict)}
    done = all(200 <= status < 300 for status in statuses)
    agree = bool(entries) and done and len(digests) <= 1
    if not entries:
        return _refusal(503, "no replica is ready")
    status = 200 if agree else statuses.pop() if len(statuses) == 1 and not done else 207
    return JSONResponse({"agree": agree, "replicas": entries}, status)


def _lost(error: BaseException) -> Entry:
    return {"replica": None, "status": 503, "error": f"the replica did not answer ({type(error).__name__})"}


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"type": "FleetError", "message": message}}, status)
