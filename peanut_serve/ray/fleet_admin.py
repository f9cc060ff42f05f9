"""The admin API of a fleet: what every replica has, whether they agree, and changes that go to all of them.

    GET    /admin/v1/fleet                          every replica: its engine, and the digest of each name
    GET    /admin/v1/variants, /variants/NAME       as a single server's, with an entry per replica
    GET    /admin/v1/engine                         as a single server's, with an entry per replica
    GET    /admin/v1/usage                          as a single server's: the sums of the replicas that run now
    POST   /admin/v1/variants                       to all replicas, as the following ones
    DELETE /admin/v1/variants/NAME
    POST   /admin/v1/variants/NAME/{reload,rollback,pin,unpin}
    POST   /admin/v1/variants/NAME/{activate,preload}   to one replica
    GET    /admin/v1/releases, /releases/NAME       as a single server's, with an entry per replica
    POST   /admin/v1/releases/NAME/{hold,stage,check,weight,promote,rollback}   of all replicas

The schemas are in `peanut_serve.web.fleet_schema`. An answer of all has an entry per replica. Its status is 200 if
every replica did it and they have the same digest now; the one of the replicas if all refuse alike; otherwise 207.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from converters.errors import PeanutError
from peanut_serve.errors import RequestTimeoutError, RequestTooLargeError, ServingError, TryLaterError, shown
from peanut_serve.ray.fleet.asking import Entry, ask_all, lost
from peanut_serve.ray.fleet.changes import Change, FleetChanges
from peanut_serve.ray.fleet.joint import joint_change, joint_engine, joint_variants
from peanut_serve.ray.fleet.releases import GIVEN, FleetReleases, ReplicaRefusedError, Step
from peanut_serve.ray.replica import EngineReplica
from peanut_serve.web.admin import caller_of
from peanut_serve.web.bearer import sent_key
from peanut_serve.web.operators import Operator, Operators
from peanut_serve.web.schema import Registration, Rollback
from peanut_serve.web.usage import UsageReport, summed

PREFIX = "/admin/v1"
_VERB = re.compile(r"/variants/(?P<name>.+)/(?P<verb>reload|rollback|pin|unpin|activate|preload)")
_NAME = re.compile(r"/variants/(?P<name>.+)")
_AT_ONE = ("activate", "preload")
_GLANCE = 10.0  # seconds, for what is known already
_MOST_BYTES = 64 << 10  # of a body
_BODY_SECONDS = 30.0  # until it has arrived
_RELEASE = re.compile(r"/releases/(?P<name>.+)")
_STEP = re.compile(rf"/releases/(?P<name>.+)/(?P<verb>{'|'.join(GIVEN)})")

_T = TypeVar("_T", bound=BaseModel)


class FleetAdmin:
    """Answers the requests of operators at the front.

    Args:
        engines: the replicas.
        operators: who may ask.
        changes: makes their changes.
        releases: makes those of releases.
    """

    def __init__(
        self,
        engines: DeploymentHandle[EngineReplica],
        operators: Operators,
        changes: FleetChanges,
        releases: FleetReleases,
    ) -> None:
        self._engines, self._operators, self._changes, self._releases = engines, operators, changes, releases

    async def answer(self, request: Request) -> Response:
        """Answer a request for a path below `PREFIX`."""
        path = str(request.scope["path"]).removeprefix(PREFIX)
        try:
            operator = self._operators.find(sent_key(request.scope))
            if request.method == "GET":
                return await self._show(path) or _unknown(request)
            operator.check_change(f"{request.method} {shown(path)}")
            if request.method == "POST" and (found := _STEP.fullmatch(path)):
                return await self._step(found["verb"], found["name"], request, operator)
            change = await self._change_of(request, path, operator)
            if change is None:
                return _unknown(request)
            if change.action in _AT_ONE:
                entry = await self._at_one(change)
                return JSONResponse(_with_error(entry), entry["status"])
            return of_all(await self._changes.make(change))
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            return _refusal(422, wrong, "RequestError")
        except ReplicaRefusedError as error:
            return _refusal(error.status, str(error), error.kind)
        except PeanutError as error:
            return _answer_refusal(error)
        except TimeoutError:
            return _refusal(504, "a replica took too long to answer; GET /admin/v1/fleet shows what they have")
        except (RayError, RayServeException) as error:
            return _refusal(503, f"no replica is ready ({type(error).__name__})")

    async def _show(self, path: str) -> Response | None:
        if path == "/fleet":
            return _fleet(await self._ask("report"))
        if path == "/engine":
            return _engine(await self._ask("call_admin", "GET", "/engine"))
        if path == "/usage":
            return _usage(await self._ask("call_admin", "GET", "/usage"))
        if path == "/variants":
            return _listed(await self._ask("variants"))
        if found := _NAME.fullmatch(path):
            return _listed(await self._ask("variants"), found["name"])
        if path == "/releases":
            return JSONResponse([one.model_dump(mode="json") for one in await self._releases.all()])
        if found := _RELEASE.fullmatch(path):
            return JSONResponse((await self._releases.show(found["name"])).model_dump(mode="json"))
        return None

    async def _step(self, verb: str, name: str, request: Request, operator: Operator) -> Response:
        """A step of a release. Its status is 200 if every replica has it as it is wanted then, otherwise 207."""
        body, kind = await _read(request), GIVEN[verb]
        is_empty = kind is None or (body in (b"", b"null") and verb != "weight")
        given = None if kind is None or is_empty else _parsed(kind, body)
        release = await self._releases.make(Step(verb, name, caller_of(request.scope, operator), given))
        if release is None:
            return Response(status_code=204)
        return JSONResponse(release.model_dump(mode="json"), 200 if release.agree else 207)

    async def _ask(self, method: str, *arguments: Any) -> list[Entry]:
        return await ask_all(self._engines, method, *arguments, within=_GLANCE)

    async def _change_of(self, request: Request, path: str, operator: Operator) -> Change | None:
        by = caller_of(request.scope, operator)
        body = await _read(request)
        if request.method == "POST" and path == "/variants":
            registration = _parsed(Registration, body)
            return Change("register", registration.name, by, registration)
        if request.method == "POST" and (found := _VERB.fullmatch(path)):
            to = _parsed(Rollback, body) if found["verb"] == "rollback" and body not in (b"", b"null") else Rollback()
            return Change(found["verb"], found["name"], by, rollback=to)
        if request.method == "DELETE" and (found := _NAME.fullmatch(path)):
            return Change("unregister", found["name"], by, drain=_flag(request, "drain"))
        return None

    async def _at_one(self, change: Change) -> Entry:
        try:
            return await self._changes.make_at_one(change)
        except (RayError, RayServeException) as error:
            return lost(error)


async def _read(request: Request) -> bytes:
    body = b""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > _MOST_BYTES:
                    raise RequestTooLargeError(f"the body is larger than {_MOST_BYTES >> 10} KiB")
    except TimeoutError:
        raise RequestTimeoutError(f"the request's body did not arrive within {_BODY_SECONDS:.0f} s") from None
    return body


def _parsed(kind: type[_T], body: bytes) -> _T:
    return kind.model_validate_json(body)


class _Flag(BaseModel):
    value: bool = False


def _flag(request: Request, name: str) -> bool:
    given = request.query_params.get(name)
    return given is not None and _Flag.model_validate({"value": given}).value


def _fleet(entries: Sequence[Entry]) -> Response:
    names = sorted({name for entry in entries for name in entry.get("digests", {})})
    told = {name: {entry.get("digests", {}).get(name) for entry in entries} for name in names}
    differ = {name for name in names if len(told[name] - {None}) > 1}
    withheld = {name for entry in entries for name in entry.get("withheld", {})}
    disputed = sorted(differ | withheld)
    current = {entry["revision"] for entry in entries if "revision" in entry}
    agree = not disputed and all(entry["status"] == 200 for entry in entries) and len(current) <= 1
    return JSONResponse({"agree": agree, "disputed": disputed, "replicas": entries})


def _listed(entries: Sequence[Entry], name: str | None = None) -> Response:
    refused = [entry for entry in entries if entry["status"] != 200]
    if len(refused) == len(entries):
        return _refusal(503, f"no replica answers: {joint_change(refused).message}")
    variants = joint_variants(entries)
    if name is None:
        return JSONResponse([variant.model_dump(mode="json") for variant in variants])
    found = next((variant for variant in variants if variant.name == name), None)
    if found is None:
        return _refusal(404, f"no replica has a variant {name!r}", "UnknownVariantError")
    return JSONResponse(found.model_dump(mode="json"))


def _usage(entries: Sequence[Entry]) -> Response:
    told = [UsageReport.model_validate(entry["answer"]) for entry in entries if entry["status"] == 200]
    if not told:
        return _refusal(503, f"no replica answers: {joint_change(entries).message}")
    return JSONResponse(summed(told).model_dump(mode="json"))


def _engine(entries: Sequence[Entry]) -> Response:
    try:
        return JSONResponse(joint_engine(entries).model_dump(mode="json"))
    except LookupError:
        return _refusal(503, f"no engine answers: {joint_change(entries).message}")


def of_all(entries: Sequence[Entry]) -> Response:
    """The answer to a change that went to all replicas."""
    if not entries:
        return _refusal(503, "no replica is ready")
    change = joint_change(entries)
    body = change.model_dump(mode="json")
    statuses = {entry["status"] for entry in entries}
    if change.agree:
        return JSONResponse(body, 200)
    if len(statuses) > 1 or change.replicas[0].is_done:
        return JSONResponse(body, 207)
    kind = entries[0]["answer"]["error"].get("type") if _has_error(entries[0]) else None
    reasons = dict.fromkeys(one.reason for one in change.replicas if one.reason)
    return JSONResponse(
        {**body, "error": {"type": kind or "FleetError", "message": "; ".join(reasons)}}, statuses.pop()
    )


def _has_error(entry: Entry) -> bool:
    answer = entry.get("answer")
    return isinstance(answer, dict) and isinstance(answer.get("error"), dict)


def _with_error(entry: Entry) -> Entry:
    """An entry of one replica; a refusal also in the form of a single server's."""
    if entry["status"] < 300:
        return entry
    error = entry["answer"]["error"] if _has_error(entry) else {"type": "FleetError", "message": entry.get("error")}
    return {**entry, "error": error}


def _answer_refusal(error: PeanutError) -> Response:
    status = error.status if isinstance(error, ServingError) else 422
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, TryLaterError) else None
    return _refusal(status, str(error), type(error).__name__, headers)


def _unknown(request: Request) -> Response:
    return _refusal(404, f"{request.method} {request.url.path} is not served by a fleet")


def _refusal(
    status: int, message: str, kind: str = "FleetError", headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse({"error": {"type": kind, "message": message}}, status, headers)
