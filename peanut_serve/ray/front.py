"""The address of the fleet: an HTTP application that passes each request on to the replica that the router chose."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from peanut_serve.errors import (
    EngineDownError,
    EngineLostError,
    QueueFullError,
    RequestBodyError,
    RequestTimeoutError,
    RequestTooLargeError,
    ServingError,
    TenantLimitError,
    TryLaterError,
    UnknownVariantError,
    shown,
)
from peanut_serve.ray.fleet.changes import FleetChanges
from peanut_serve.ray.fleet.metrics import JointMetrics
from peanut_serve.ray.fleet.releases import FleetReleases
from peanut_serve.ray.fleet.store import WantedStore
from peanut_serve.ray.fleet.view import ReleaseView
from peanut_serve.ray.fleet.wanted import base_of
from peanut_serve.ray.fleet_admin import PREFIX, FleetAdmin
from peanut_serve.ray.replica import EngineReplica, end_to_end
from peanut_serve.ray.replica import Request as EngineRequest
from peanut_serve.ray.settings import FleetSettings
from peanut_serve.ray.visited import visited
from peanut_serve.tenants.visits import TENANT_HEADER, Tenants, Visit
from peanut_serve.web.audit import AuditLog
from peanut_serve.web.bearer import read_keys
from peanut_serve.web.clients import Clients, check_route
from peanut_serve.web.operators import Operators
from peanut_serve.web.refusals import error_body
from peanut_serve.web.request_body import SESSION_HEADER, Bodies, Take, check_own, parse_body, session_of, variant_of
from peanut_serve.web.routes import Access, access_to

logger = logging.getLogger("ray.serve")

_TRIES = 3  # replicas, until a request has had its first byte
_MOST_LOST = 2  # engines: a request that ends its engine must not end all of them
_TAKEN = 30.0  # seconds until a replica has taken a request
_PAUSE = 0.5  # seconds before another try: by then Ray knows which replicas are gone
_MOST_BYTES = 64 << 20  # of a body
_BODY_SECONDS = 60.0  # until it has arrived, as at a single server
_LONGEST_NAME = 200
_MODELS = "/v1/models"
_HEALTH = "/health"
_METRICS = ("/metrics", "/metrics/")
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
_GONE = (RayError, ReplicaUnavailableError)
_LOST = "the replica that answered was lost; send the request again"


@dataclass(frozen=True)
class _Asked:
    """What a request names.

    Attributes:
        variant: in the request, or no text.
        session: see `session_of`.
    """

    variant: str = ""
    session: str | None = None


def _asked(request: Request, body: bytes, access: Access, visit: Visit) -> _Asked:
    """What a request names. Raises `ForbiddenError` if its tenant may not use that."""
    if request.method != "POST":
        return _Asked()
    value = parse_body(body)
    variant = variant_of(value, request.scope) or ""
    if access in (Access.ANSWER, Access.NAMES):
        if visit.is_restricted and not variant:
            raise visit.forbid("requests without the name of a variant in model")
        visit.check(variant)
        check_own(value, visit)
    return _Asked(variant, session_of(value, request.scope))


def _passed(request: Request, body: bytes, visit: Visit, session: str | None) -> EngineRequest:
    """A request for an engine, which counts what it does for the tenant. A session is added, if it has none."""
    url = request.url
    target = f"{url.path}?{url.query}" if url.query else url.path
    headers = [(key, value) for key, value in request.scope["headers"] if key.lower() != TENANT_HEADER]
    if visit.is_tenant:
        headers.append((TENANT_HEADER, visit.tenant.encode()))
    if session is not None:
        headers.append((SESSION_HEADER, session.encode()))
    return request.method, target, headers, body


async def _without_other_names(request: Request, answer: Response, variant: str, visit: Visit) -> Response:
    """An answer for a tenant that may not use all variants: without the names of others."""
    if answer.status_code == UnknownVariantError.status and request.method == "POST":
        return _refusal(UnknownVariantError(f"there is no variant {shown(variant)}"))
    if request.url.path != _MODELS or answer.status_code != 200:
        return answer
    content = bytes(answer.body) if not isinstance(answer, StreamingResponse) else await _whole(answer)
    listed = json.loads(content)
    return JSONResponse({**listed, "data": [one for one in listed["data"] if visit.may_use(one["id"])]})


async def _whole(answer: StreamingResponse) -> bytes:
    """The content of an answer that comes in parts of bytes."""
    return b"".join([part async for part in answer.body_iterator if isinstance(part, bytes)])


async def _events(answer: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The rest of a stream; if the replica is lost, an event says so, instead of an end that looks like any other."""
    part = b"\n\n"
    try:
        async for part in answer:
            yield part
    except _GONE as error:
        logger.warning("a stream was cut: %s", type(error).__name__)
        if not part.endswith(b"\n\n"):  # within an event
            yield b"\n\n"
        yield f"data: {json.dumps(error_body(EngineDownError(_LOST), 503))}\n\n".encode()


async def _read(request: Request, take: Take) -> bytes:
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > _MOST_BYTES:
                    raise RequestTooLargeError(f"the body is larger than {_MOST_BYTES >> 20} MiB")
                take(len(part))
                parts.append(part)
    except TimeoutError:
        raise RequestTimeoutError(f"the request's body did not arrive within {_BODY_SECONDS:.0f} s") from None
    return b"".join(parts)


def _is_text(query: bytes) -> bool:
    try:
        query.decode()  # as Starlette does for every use of the URL
    except UnicodeDecodeError:
        return False
    return True


def _refusal(error: ServingError) -> JSONResponse:
    """An error as a response."""
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, TryLaterError) else {}
    if isinstance(error, TenantLimitError):
        headers |= {key.decode(): value.decode() for key, value in error.headers}
    return JSONResponse(error_body(error, error.status), error.status, headers)


# Ray copies the class and what it uses as soon as it is decorated, so that it comes last
_application = FastAPI(openapi_url=None)


@serve.ingress(_application)
class Front:
    """The callable of the Serve deployment `Front`."""

    def __init__(self, engines: DeploymentHandle[EngineReplica], settings: dict[str, Any]) -> None:
        fleet = FleetSettings.model_validate(settings)
        self._engines = engines.options(stream=True, method_name="handle")
        watched = fleet.watched_keys()
        self._tenants = Tenants(watched, fleet.most_waiting) if watched is not None else None
        self._clients = Clients(read_keys(fleet.key_file), self._tenants)
        wanted = WantedStore(serve.get_replica_context().app_name, base_of(fleet.engine.options), None)
        self._admin, releases = None, None
        if fleet.has_admin:
            operators, log = Operators(read_keys(fleet.admin_key_file), watched), AuditLog(fleet.audit_file)
            changes = FleetChanges(engines, wanted, log)
            releases = FleetReleases(engines, wanted, changes, log)
            self._admin = FleetAdmin(engines, operators, changes, releases)
        self._releases = ReleaseView(wanted, releases.end_failing if releases is not None else None)
        self._bodies = Bodies(_MOST_BYTES)
        self._metrics = JointMetrics(engines, has_tenants=self._tenants is not None)

    def reconfigure(self, changed: dict[str, Any]) -> None:
        """Called by Ray at the start, and when `user_config` has changed; see `FleetSettings.of_front`."""
        if self._tenants is not None:
            self._tenants.limit(changed["most_waiting"])

    @_application.api_route("/{path:path}", methods=_METHODS)
    async def answer(self, request: Request) -> Response:
        """Pass a request on; errors have the form of OpenAI's API."""
        if not _is_text(request.scope["query_string"]):
            return _refusal(RequestBodyError("the query of the URL is not UTF-8; encode its bytes as %XX"))
        self._releases.start()
        if self._admin is not None and request.url.path.startswith(f"{PREFIX}/"):
            return await self._admin.answer(request)
        if request.method in ("GET", "HEAD") and request.url.path == _HEALTH:
            return JSONResponse({"state": "alive"})  # Serve starts lost engines again: a restart of this is no cure
        if request.method == "GET" and request.url.path in _METRICS:
            return Response(await self._metrics.page(), media_type=CONTENT_TYPE_LATEST)
        try:
            return await self._answer(request)
        except ServingError as error:
            return _refusal(error)

    async def _answer(self, request: Request) -> Response:
        access = access_to(request.url.path)
        visit = Visit() if access is Access.OPEN else await self._clients.enter(request.scope)
        return await visited(visit, self._answer_of(request, access, visit), _refusal)

    async def _answer_of(self, request: Request, access: Access, visit: Visit) -> Response:
        check_route(request.scope, request.url.path, access, visit)
        with self._bodies.share() as take:
            body = await _read(request, take)
            asked = _asked(request, body, access, visit)
            answer = await self._pass_on(asked, request, body, visit)
        return await _without_other_names(request, answer, asked.variant, visit) if visit.is_restricted else answer

    async def _pass_on(self, asked: _Asked, request: Request, body: bytes, visit: Visit) -> Response:
        """Pass a request on to where the version is that answers it.

        While a release has a share, one without a session gets one for itself: so the engine draws as the front did.
        """
        session, added = asked.session, None
        if session is None and self._releases.has_share(asked.variant):
            session = added = uuid4().hex
        variant = self._releases.answering(asked.variant, session)
        return await self._try(asked.variant, variant, _passed(request, body, visit, added), visit)

    async def _try(self, asked: str, variant: str, request: EngineRequest, visit: Visit) -> Response:
        variant = variant[:_LONGEST_NAME]  # clients choose the name, of any length; its beginning will do
        lost = 0
        for last in [False] * (_TRIES - 1) + [True]:
            sent: Any = self._engines.options(multiplexed_model_id=variant).remote(asked, variant, request)
            answer: AsyncIterator[Any] = aiter(sent)
            try:
                async with asyncio.timeout(_TAKEN):
                    await sent._fetch_future_result_async()  # taken by a replica; nothing public waits for that
                visit.admit()
                status, headers, body = await anext(answer)
            except BackPressureError:
                raise QueueFullError("too many requests are waiting") from None
            except (TimeoutError, DeploymentUnavailableError):
                sent.cancel()  # or a replica would answer nobody later
                raise EngineDownError("no replica is ready", 5) from None
            except _GONE as error:
                told = getattr(error, "cause", None)  # of a replica that refused it
                lost += isinstance(told, EngineLostError)
                if last or lost == _MOST_LOST:
                    raise (told if isinstance(told, ServingError) else EngineDownError(_LOST)) from None
                await asyncio.sleep(_PAUSE)
                continue
            streams = any(key == b"content-type" and value.startswith(b"text/event-stream") for key, value in headers)
            parts = _events(answer) if streams else answer
            response = StreamingResponse(parts, status) if body is None else Response(body, status)
            response.raw_headers = end_to_end(headers)
            return response
        raise AssertionError("the last try returns")
