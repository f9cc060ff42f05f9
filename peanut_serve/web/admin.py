"""The admin API over HTTP: variants, and the engine that has the weights of one of them.

It has a port and a key of its own: who may ask for completions may not thereby change what is served.
"""

import asyncio
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from converters.errors import MissingDependencyError, OptionError, PeanutError
from peanut_serve.errors import ServingError, TryLaterError
from peanut_serve.settings.admin_key import checked_key
from peanut_serve.web.schema import (
    Control,
    EngineStatus,
    ErrorAnswer,
    ErrorDetail,
    Registration,
    Rollback,
    VariantStatus,
)

try:
    import uvicorn
    from fastapi import APIRouter, Depends, FastAPI, Query, Request, Security
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response
    from fastapi.security import HTTPBearer
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise MissingDependencyError(
        f"the admin API needs fastapi and uvicorn, which vLLM brings ({error}): pip install 'peanut-serve[vllm]'"
    ) from None

# seconds that answers under way have when the server stops; a swap is not among what is worth waiting for
_GRACE = 5


async def _control(request: Request) -> Control:
    control: Control = request.app.state.control
    return control


# only says in the OpenAPI document that there is a key; `_KeyGuard` looks at it
_BEARER = HTTPBearer(auto_error=False, scheme_name="adminKey", description="The admin key, not that of completions.")
_Controlled = Annotated[Control, Depends(_control)]
_Drain = Annotated[bool, Query(description="Take no more of its requests, and wait for those there are.")]

_DESCRIPTIONS = {
    401: "The key is missing or wrong.",
    404: "No variant has the name, or no version the digest.",
    409: "The name is taken or not allowed, or the variant in use.",
    422: "The request is malformed, or the variant cannot be evaluated.",
    500: "The swap failed; the engine has the weights it had before.",
    503: "The engine is down; see Retry-After.",
}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer, "description": _DESCRIPTIONS[status]} for status in statuses}


_SWAPPING = _refusals(404, 422, 500, 503)

# Handlers are coroutines, those that wait for nothing too: FastAPI would run functions in threads, beside the loop.
# `:path` lets a name have a slash, as Hub ids do, sent as it is or as %2F; a verb is always the last segment.
_routes = APIRouter(
    prefix="/admin/v1",
    dependencies=[Security(_BEARER)],
    responses={**_refusals(401), "default": {"model": ErrorAnswer, "description": "Any other refusal."}},
)


@_routes.get("/variants", summary="All variants")
async def list_variants(control: _Controlled) -> list[VariantStatus]:
    """Every variant as it is now, the base too."""
    return control.variants()


@_routes.post("/variants", summary="Add a variant", status_code=201, responses=_refusals(409, 422, 503))
async def register_variant(control: _Controlled, registration: Registration) -> VariantStatus:
    """Answers once it is evaluated, which can take minutes."""
    return await control.register(registration.name, registration.source)


@_routes.get("/variants/{name:path}", summary="One variant", responses=_refusals(404))
async def get_variant(control: _Controlled, name: str) -> VariantStatus:
    """One variant as it is now."""
    return control.variant(name)


@_routes.delete("/variants/{name:path}", summary="Remove a variant", status_code=204, responses=_refusals(404, 409))
async def unregister_variant(control: _Controlled, name: str, drain: _Drain = False) -> None:
    """Its files are left as they are."""
    await control.unregister(name, drain)


@_routes.post("/variants/{name:path}/activate", summary="Swap a variant in", responses=_SWAPPING)
async def activate_variant(control: _Controlled, name: str) -> VariantStatus:
    """Answers once the engine has its weights, which can take minutes."""
    return await control.activate(name)


@_routes.post("/variants/{name:path}/reload", summary="Read a variant's source again", responses=_SWAPPING)
async def reload_variant(control: _Controlled, name: str) -> VariantStatus:
    """The version that was there is kept for a rollback. Can take minutes."""
    return await control.reload(name)


@_routes.post("/variants/{name:path}/rollback", summary="Go back to an earlier version", responses=_SWAPPING)
async def rollback_variant(control: _Controlled, name: str, to: Rollback | None = None) -> VariantStatus:
    """Without a body, to the version before."""
    return await control.rollback(name, to.digest if to else None)


@_routes.post("/variants/{name:path}/pin", summary="Keep a variant's weights on the host", responses=_SWAPPING)
async def pin_variant(control: _Controlled, name: str) -> VariantStatus:
    """They are no longer dropped for those of others."""
    return await control.pin(name, True)


@_routes.post("/variants/{name:path}/unpin", summary="Pin a variant no longer", responses=_refusals(404))
async def unpin_variant(control: _Controlled, name: str) -> VariantStatus:
    """Its weights may be dropped from the host for those of others."""
    return await control.pin(name, False)


@_routes.get("/engine", summary="The engine")
async def get_engine(control: _Controlled) -> EngineStatus:
    """What it does, and whose weights it has."""
    return control.engine()


async def healthz() -> dict[str, str]:
    """That the admin API answers; of the engine it says nothing. Needs no key."""
    return {"status": "ok"}


def admin_app(control: Control, key: str) -> FastAPI:
    """The admin API. All but GET /healthz needs `Authorization: Bearer KEY`, the OpenAPI document too.

    Raises `OptionError` for a key that no header can carry.
    """
    app = FastAPI(
        title="peanut-serve admin API",
        description="See, swap, add and remove the variants of a running `peanut-serve --mode merged`.",
        version="1",
        openapi_url=f"{_routes.prefix}/openapi.json",
        docs_url=None,  # a browser would ask for these without the key
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        exception_handlers={
            PeanutError: _answer_refusal,
            HTTPException: _answer_http_error,
            RequestValidationError: _answer_malformed,
            Exception: _answer_bug,
        },
    )
    app.state.control = control
    app.add_api_route("/healthz", healthz, summary="Whether it answers")
    app.include_router(_routes)
    app.add_middleware(_KeyGuard, key=checked_key(key, "the server's settings"))
    return app


class _KeyGuard:
    """Asks for the key before anything else is done: a dependency would run after the body was read and parsed."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/healthz" or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        message = "the admin key is missing or wrong: Authorization: Bearer KEY"
        refusal = _refusal(401, "AuthenticationError", message, {"WWW-Authenticate": "Bearer"})
        await refusal(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        # bytes, as they came: compare_digest takes no str that is not ASCII
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(key.strip(), self._key)


def _refusal(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    answer = ErrorAnswer(error=ErrorDetail(type=kind, message=message))
    return JSONResponse(answer.model_dump(), status, headers)


async def _answer_refusal(_: Request, error: PeanutError) -> Response:
    # what converters refuse is always what they were given
    status = error.status if isinstance(error, ServingError) else 422
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, TryLaterError) else None
    return _refusal(status, type(error).__name__, str(error), headers)


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _refusal(error.status_code, "RequestError", message, error.headers)


async def _answer_malformed(_: Request, error: RequestValidationError) -> Response:
    wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    return _refusal(422, "RequestError", wrong)


async def _answer_bug(_: Request, error: Exception) -> Response:
    return _refusal(500, "InternalError", f"{type(error).__name__}, not meant to happen; see the server's log")


class _Server(uvicorn.Server):
    """Leaves the signals to vLLM, which stops what runs in its loop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """Listen, before the engine is started: that the port is taken is then known at once, to others as well.

    Raises `OptionError` where that is not possible.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OptionError(f"the admin API cannot listen on {host}:{port}: {error.strerror}; choose another") from None
    # connections inherit it; asyncio would not set it, for this socket doesn't say that it is TCP: 40 ms an answer
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def serve_on(app: FastAPI, listener: socket.socket) -> None:
    """Serve in the running loop until cancelled."""
    # no log_config: the loggers of uvicorn are set up by vLLM, for both servers
    config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=_GRACE)
    server = _Server(config)
    try:
        await server.serve([listener])
    except asyncio.CancelledError:
        if server.started:
            await server.shutdown([listener])
        raise
