"""The HTTP application: routes, errors, and the OpenAPI description."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from converters import __version__
from converters.errors import MissingDependencyError, PeanutError
from peanut_serve.classify.http import examples, open_inference
from peanut_serve.classify.http.asking import ask_task
from peanut_serve.classify.http.console import TaskConsole
from peanut_serve.classify.http.door import CLIENTS, FACTS, Door, refusal
from peanut_serve.classify.http.tensors import HEADER
from peanut_serve.classify.serving.server import TaskServer
from peanut_serve.classify.serving.version import TaskVersion
from peanut_serve.errors import RouteRefusedError, TryLaterError
from peanut_serve.tenants.visits import Tenants, current_visit, may_use
from peanut_serve.web.request_body import ClientLimits

try:
    from fastapi import APIRouter, FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise MissingDependencyError(
        f"the server of classifiers needs FastAPI ({error}): pip install 'peanut-serve[classify]'"
    ) from None

_ERRORS: dict[int | str, dict[str, Any]] = {"default": examples.ERROR}
_routes = APIRouter(responses=_ERRORS)
_NAME = "/models/{name}"
_VERSION = f"{_NAME}/versions/{{version}}"


def _server(request: Request) -> TaskServer:
    found: TaskServer = request.app.state.server
    return found


def _asked(request: Request, name: str) -> None:
    """Tell the door what a request asks; a name is kept only if it is one of the server's."""
    request.scope[FACTS]["asked"] = name
    if _server(request).library.is_known(name):
        request.scope[FACTS]["name"] = name


def _answered(request: Request, version: TaskVersion) -> None:
    request.scope[FACTS].update(name=version.name, digest=version.digest)


@_routes.get("/health", summary="Check that the server runs")
async def health() -> dict[str, str]:
    """Needs no key."""
    return {"status": "ok"}


@_routes.get("/ready", summary="Check that requests are answered", responses={503: examples.ERROR})
async def ready(request: Request) -> dict[str, str]:
    """503 while the server stops. Needs no key."""
    if not _server(request).is_ready:
        raise TryLaterError("the server is stopping", 1)
    return {"status": "ready"}


@_routes.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    """Needs no key."""
    server = _server(request)
    return Response(server.exposition(), media_type="text/plain; version=0.0.4")


@_routes.get("/models", summary="List the tasks")
async def list_models(request: Request) -> list[str]:
    """The names that requests of this client can use."""
    return [name for name in await _server(request).names() if may_use(name)]


@_routes.post(
    "/models/{name}",
    summary="Ask a task, by the inference protocol of Hugging Face",
    openapi_extra={"requestBody": examples.HUGGING_FACE_BODY},
    responses={200: examples.HUGGING_FACE_ANSWER},
    tags=["Hugging Face inference"],
)
async def ask(request: Request, name: str) -> Response:
    """The body is an image or a sound, or JSON with `inputs` and `parameters`."""
    _asked(request, name)
    content_type = request.headers.get("content-type", "")
    found, written = await ask_task(_server(request), name, await request.body(), content_type)
    _answered(request, found.version)
    return Response(written, media_type="application/json")


_v2 = APIRouter(prefix="/v2", responses=_ERRORS, tags=["Open Inference Protocol"])


@_v2.get("", summary="Show the server")
async def server_metadata() -> dict[str, Any]:
    """Its name, version and extensions."""
    return {"name": "peanut-serve", "version": __version__, "extensions": ["binary_tensor_data", "classification"]}


@_v2.get("/health/live", summary="Check that the server runs", name="live")
async def live() -> dict[str, bool]:
    """Needs no key."""
    return {"live": True}


@_v2.get(
    "/health/ready", summary="Check that requests are answered", name="v2_ready", responses={503: examples.ERROR}
)
async def v2_ready(request: Request) -> dict[str, bool]:
    """503 while the server stops. Needs no key."""
    await ready(request)
    return {"ready": True}


@_v2.get(_NAME, summary="Show a task", name="model")
@_v2.get(_VERSION, summary="Show a version of a task", name="model_version")
async def model_metadata(request: Request, name: str, version: str | None = None) -> JSONResponse:
    """Its versions (one, the current), inputs and outputs."""
    found = await _server(request).version(name, version)
    _answered(request, found)
    return JSONResponse(open_inference.metadata(found))


@_v2.get(f"{_NAME}/ready", summary="Check that a task can be asked", name="model_ready")
@_v2.get(f"{_VERSION}/ready", summary="Check that a version of a task can be asked", name="model_version_ready")
async def model_ready(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """An error if its files are broken, as far as is known: they are opened by the first request."""
    found = await _server(request).version(name, version)
    if found.failure:
        raise found.failure[0]
    return {"name": name, "ready": True}


_INFER: dict[str, Any] = {
    "openapi_extra": {"requestBody": examples.INFER_BODY},
    "responses": {200: examples.INFER_ANSWER},
}


@_v2.post(f"{_NAME}/infer", summary="Ask a task", name="infer", **_INFER)
@_v2.post(f"{_VERSION}/infer", summary="Ask a version of a task", name="infer_version", **_INFER)
async def infer(request: Request, name: str, version: str | None = None) -> Response:
    """The inputs are images or texts (BYTES), or the tensors of the graph. Supports Triton's binary tensors."""
    _asked(request, name)
    server = _server(request)
    current = await server.version(name, version)
    body = await request.body()
    found, written, end = await open_inference.infer(server, current, body, request.headers.get(HEADER), version)
    _answered(request, found.version)
    if end is None:
        return Response(written, media_type="application/json")
    return Response(written, media_type="application/octet-stream", headers={HEADER: str(end)})


async def _answer_refusal(request: Request, error: PeanutError) -> Response:
    name, visit = request.path_params.get("name", ""), current_visit.get()
    if visit is not None and not _server(request).library.is_known(name):
        error = visit.without_names(error, name, "task")
    status, body, headers = refusal(error)
    return Response(body, status, headers)


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    kind = RouteRefusedError.__name__ if error.status_code == 404 else "RequestError"
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse({"error": message, "type": kind}, error.status_code, error.headers)


async def _answer_bug(_: Request, error: Exception) -> Response:
    message = f"unexpected {type(error).__name__}; see the server's log"
    return JSONResponse({"error": message, "type": "InternalError"}, 500)


def classify_app(
    server: TaskServer,
    keys: Sequence[str] = (),
    limits: ClientLimits = CLIENTS,
    console: TaskConsole | None = None,
    tenants: Tenants | None = None,
) -> FastAPI:
    """Build the application. It stops the server when it is shut down.

    Args:
        server: answers.
        keys: of clients; empty if none is needed.
        limits: of each client.
        console: that it has at /console; None if it has none.
        tenants: of the keys file, if there is one.

    Raises `MissingDependencyError` if the console needs a package that is not installed.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with server:
            await server.warm_up()
            yield

    app = FastAPI(
        title="peanut-serve classify",
        description="Classifiers and other models that `peanut-merge --format onnx` wrote, on ONNX Runtime.",
        version=__version__,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
        exception_handlers={
            PeanutError: _answer_refusal,
            HTTPException: _answer_http_error,
            Exception: _answer_bug,
        },
    )
    app.state.server = server
    app.include_router(_routes)
    app.include_router(_v2)
    if console is not None:
        from peanut_serve.classify.http.console.tasks import task_console
        from peanut_serve.web.console.shell import Fork

        app.add_middleware(Fork, console=task_console(server, console, limits.body_bytes))
    app.add_middleware(Door, server=server, keys=tuple(keys), limits=limits, tenants=tenants)
    return app
