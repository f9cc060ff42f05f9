"""The address of the classifiers: `POST /models/NAME` in the form of Hugging Face's inference API.

GET  /health       200 while the front works
GET  /ready        200 while a replica answers
GET  /metrics      what tenants of the keys file have used, and what they were refused
GET  /models       the tasks, with what they do and their labels
GET  /replicas     what each replica has loaded, and the inputs and batches of each task
POST /models/NAME  see `peanut_serve.classify.hugging_face`
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from peanut_serve.errors import (
    EngineDownError,
    QueueFullError,
    RequestTimeoutError,
    RequestTooLargeError,
    ServingError,
    TenantLimitError,
    TryLaterError,
    UnauthorizedError,
    UnknownVariantError,
    shown,
)
from peanut_serve.ray.classifiers.door import FrontDoor, metrics_page
from peanut_serve.ray.classifiers.engines import open_engines
from peanut_serve.ray.classifiers.replica import ClassifierReplica, Reply
from peanut_serve.ray.classifiers.settings import ClassifierSettings
from peanut_serve.ray.visited import visited
from peanut_serve.tenants.visits import Visit
from peanut_serve.web.request_body import Bodies, Take

logger = logging.getLogger("ray.serve")

_TRIES = 2  # replicas: a request that ends its replica must not end all of them
_LONGEST = 120.0  # seconds for an answer, with the time in the queue and the loading of a task
_GLANCE = 10.0  # seconds, for an answer that is known
_PAUSE = 0.5  # seconds before another try: by then Ray knows which replicas are gone
_BODY_SECONDS = 60.0  # until a body has arrived


def _refusal(error: ServingError) -> JSONResponse:
    """An error in the form that Hugging Face's clients show."""
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, TryLaterError) else {}
    if isinstance(error, TenantLimitError):
        headers |= {key.decode(): value.decode() for key, value in error.headers}
    if isinstance(error, UnauthorizedError):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": str(error), "error_type": type(error).__name__}, error.status, headers)


async def _answered(entering: Awaitable[Visit], answer: Callable[[Visit], Awaitable[Response]]) -> Response:
    """The answer to a request that begins, or what it is refused with."""
    try:
        visit = await entering
    except ServingError as error:
        return _refusal(error)
    return await visited(visit, answer(visit), _refusal)


# Ray copies the class and what it uses as soon as it is decorated, so that it comes last
_application = FastAPI(openapi_url=None)


@serve.ingress(_application)
class ClassifierFront:
    """The callable of the Serve deployment `ClassifierFront`."""

    def __init__(self, replicas: DeploymentHandle[ClassifierReplica], settings: dict[str, Any]) -> None:
        parsed = ClassifierSettings.model_validate(settings)
        self._replicas = replicas
        self._tasks = {name: engine.tasks[name] for name, engine in open_engines(parsed).items()}
        self._door = FrontDoor(parsed)
        self._most_bytes, self._bodies = parsed.most_bytes, Bodies(parsed.most_bytes)

    def reconfigure(self, changed: dict[str, Any]) -> None:
        """Called by Ray at the start, and when `user_config` has changed; see `ClassifierSettings.of_front`."""
        self._door.places = changed["most_waiting"]

    @_application.get("/health")
    async def health(self) -> Response:
        """That the front works: Serve starts lost replicas again, and a restart of the front would be no cure."""
        return JSONResponse({"state": "alive"})

    @_application.get("/ready")
    async def ready(self) -> Response:
        """Whether a replica answers."""
        try:
            async with asyncio.timeout(_GLANCE):
                await self._replicas.options(method_name="report").remote()
        except (TimeoutError, RayError, BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError):
            return _refusal(EngineDownError("no replica is ready", 5))
        return Response()

    @_application.get("/metrics")
    async def metrics(self) -> Response:
        """What tenants have used, and what they were refused."""
        return Response(metrics_page(), media_type=CONTENT_TYPE_LATEST)

    @_application.get("/models")
    async def models(self, request: Request) -> Response:
        """The tasks that this client may use."""

        async def listed(visit: Visit) -> Response:
            """Those of this visitor."""
            tasks = [(name, one) for name, one in self._tasks.items() if visit.may_use(name)]
            return JSONResponse([{"id": name, "task": one.kind.task, "labels": one.labels} for name, one in tasks])

        return await _answered(self._door.enter(request.scope), listed)

    @_application.get("/replicas")
    async def replicas(self, request: Request) -> Response:
        """What the replicas have done; those that do not answer in time are missing."""

        async def told(visit: Visit) -> Response:
            """The reports. Raises `ForbiddenError`, `EngineDownError`."""
            if visit.is_tenant:  # which is no client without limits
                raise visit.forbid("what concerns all tenants")
            report = self._replicas.broadcast("report")
            try:
                reports = await report.results_async(timeout_s=_GLANCE, return_exceptions=True)
            except (TimeoutError, RayError, DeploymentUnavailableError):
                raise EngineDownError("a replica took too long to answer", 5) from None
            return JSONResponse([one for one in reports if isinstance(one, dict)])

        return await _answered(self._door.enter_operator(request.scope), told)

    @_application.post("/models/{name:path}")
    async def ask(self, name: str, request: Request) -> Response:
        """An answer of a task."""

        async def answer(visit: Visit) -> Response:
            """That of the task, counted. Raises `ForbiddenError`, `UnknownVariantError`."""
            visit.check(name)
            if name not in self._tasks:
                raise UnknownVariantError(f"there is no model {shown(name)}; GET /models lists them")
            try:
                return await self._answer(name, request, visit)
            finally:
                visit.count(name)

        return await _answered(self._door.enter(request.scope), answer)

    async def _answer(self, name: str, request: Request, visit: Visit) -> Response:
        with self._bodies.share() as take:
            body = await self._read(request, take)
            give_back = visit.take_inputs(1, self._door.places)
            try:
                visit.admit()
                content_type = request.headers.get("content-type", "")
                status, headers, content = await self._pass_on(name, content_type, body)
            finally:
                give_back()
        return Response(content, status, headers, "application/json")

    async def _read(self, request: Request, take: Take) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size > self._most_bytes:
                        raise RequestTooLargeError(f"the body has more than {self._most_bytes} bytes")
                    take(len(part))
                    parts.append(part)
        except TimeoutError:
            raise RequestTimeoutError(f"the body did not arrive within {_BODY_SECONDS:.0f} s") from None
        return b"".join(parts)

    async def _pass_on(self, task: str, content_type: str, body: bytes) -> Reply:
        handle = self._replicas.options(method_name="answer", multiplexed_model_id=task)
        for last in [False] * (_TRIES - 1) + [True]:
            sent: Any = handle.remote(task, content_type, body)
            try:
                async with asyncio.timeout(_LONGEST):
                    reply: Reply = await sent
                    return reply
            except BackPressureError:
                raise QueueFullError("too many requests are waiting") from None
            except (TimeoutError, DeploymentUnavailableError):
                sent.cancel()  # or a replica would answer nobody later
                raise EngineDownError(f"no replica has answered within {_LONGEST:g} s", 5) from None
            except RayTaskError as error:
                logger.exception("a replica failed on a request for %s", task)
                raise ServingError(f"the server failed ({type(error.cause).__name__}); its log has more") from None
            except (RayError, ReplicaUnavailableError):
                if last:
                    raise EngineDownError("the replica that answered was lost; send the request again") from None
                await asyncio.sleep(_PAUSE)
        raise AssertionError("the last try returns")
