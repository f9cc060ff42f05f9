"""The HTTP admin API: lists and changes the variants, and shows the state of the engine.

It has its own port and key, so that a client that may request completions cannot change what is served.
"""

from collections.abc import Mapping, MutableMapping
from typing import Annotated, Any

from converters.errors import MissingDependencyError, PeanutError
from peanut_serve.errors import ForbiddenError, ServingError, TryLaterError, UnauthorizedError, shown
from peanut_serve.web.audit import Caller, caller
from peanut_serve.web.bearer import sent_key
from peanut_serve.web.operators import Operator, Operators, operators_of
from peanut_serve.web.schema import (
    Control,
    EngineStatus,
    ErrorAnswer,
    ErrorDetail,
    Registration,
    Rollback,
    SwapStatus,
    VariantStatus,
    VariantTraffic,
)
from peanut_serve.web.usage import UsageReport, usage_report

try:
    from fastapi import APIRouter, Depends, FastAPI, Query, Request, Security
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response
    from fastapi.security import HTTPBearer
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise MissingDependencyError(
        f"the admin API needs fastapi, which vLLM brings ({error}): pip install 'peanut-serve[vllm]'"
    ) from None

_MOST_BYTES = 64 << 10  # of a body
_READING = ("GET", "HEAD")


async def _control(request: Request) -> Control:
    control: Control = request.app.state.control
    return control


# only documents the key in the OpenAPI document; `_KeyGuard` checks it
BEARER = HTTPBearer(
    auto_error=False, scheme_name="adminKey", description="The admin key, not the API key for completions."
)
_Controlled = Annotated[Control, Depends(_control)]
_Drain = Annotated[
    bool, Query(description="Wait for its requests, and abort those that take longer than --drain-timeout.")
]

_DESCRIPTIONS = {
    401: "The key is missing or wrong.",
    403: "The key is one of clients, or may change nothing.",
    404: "There is no variant of this name, or no version with this digest.",
    409: "The name is taken or not allowed, the variant is in use, or the state of its release does not allow this.",
    422: "The request is malformed, or the variant cannot be evaluated.",
    500: "The swap failed; the engine keeps the weights it had before.",
    503: "The engine is not available; see Retry-After.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, for the OpenAPI document."""
    return {status: {"model": ErrorAnswer, "description": _DESCRIPTIONS[status]} for status in statuses}


ALWAYS = {**refusals(401, 403), "default": {"model": ErrorAnswer, "description": "Any other error."}}
_SWAPPING = refusals(404, 422, 500, 503)

# All handlers are coroutines, even if they await nothing: FastAPI runs plain functions in threads, outside the loop.
# `:path` allows slashes in a name, as in Hub ids, sent as they are or as %2F; a verb is always the last segment.
_routes = APIRouter(
    prefix="/admin/v1",
    dependencies=[Security(BEARER)],
    responses=ALWAYS,
)


@_routes.get("/variants", summary="List all variants")
async def list_variants(control: _Controlled) -> list[VariantStatus]:
    """The current state of every variant, including the base."""
    return await control.variants()


@_routes.post("/variants", summary="Add a variant", status_code=201, responses=refusals(409, 422, 503))
async def register_variant(control: _Controlled, registration: Registration) -> VariantStatus:
    """Returns when the variant has been evaluated, which can take minutes."""
    return await control.register(registration.name, registration.source)


@_routes.get("/variants/{name:path}", summary="Show a variant", responses=refusals(404))
async def get_variant(control: _Controlled, name: str) -> VariantStatus:
    """The current state of one variant."""
    return control.variant(name)


@_routes.delete("/variants/{name:path}", summary="Remove a variant", status_code=204, responses=refusals(404, 409))
async def unregister_variant(control: _Controlled, name: str, drain: _Drain = False) -> None:
    """Its files are not deleted."""
    await control.unregister(name, drain)


@_routes.post("/variants/{name:path}/activate", summary="Swap a variant in", responses=_SWAPPING)
async def activate_variant(control: _Controlled, name: str) -> VariantStatus:
    """Returns when the engine has its weights, which can take minutes."""
    return await control.activate(name)


@_routes.post("/variants/{name:path}/reload", summary="Reload a variant from its source", responses=_SWAPPING)
async def reload_variant(control: _Controlled, name: str) -> VariantStatus:
    """The previous version is kept for a rollback. This can take minutes."""
    return await control.reload(name)


@_routes.post("/variants/{name:path}/rollback", summary="Roll back to an earlier version", responses=_SWAPPING)
async def rollback_variant(control: _Controlled, name: str, to: Rollback | None = None) -> VariantStatus:
    """Without a body, rolls back to the previous version."""
    to = to or Rollback()
    return await control.rollback(name, to.digest, to.hold)


@_routes.post("/variants/{name:path}/preload", summary="Evaluate a variant", responses=_SWAPPING)
async def preload_variant(control: _Controlled, name: str) -> VariantStatus:
    """Its weights are evaluated into host memory, which can take minutes: a swap to it then needs no evaluation."""
    return await control.preload(name)


@_routes.post("/variants/{name:path}/pin", summary="Pin a variant", responses=_SWAPPING)
async def pin_variant(control: _Controlled, name: str) -> VariantStatus:
    """Its weights stay in host memory: they are not evicted to make room for those of other variants."""
    return await control.pin(name, True)


@_routes.post("/variants/{name:path}/unpin", summary="Unpin a variant", responses=refusals(404))
async def unpin_variant(control: _Controlled, name: str) -> VariantStatus:
    """Its weights may be evicted from host memory to make room for those of other variants."""
    return await control.pin(name, False)


@_routes.get("/engine", summary="Show the engine")
async def get_engine(control: _Controlled) -> EngineStatus:
    """The state of the engine, and the variant whose weights it has."""
    return control.engine()


@_routes.get("/swaps", summary="List the latest swaps")
async def list_swaps(control: _Controlled) -> list[SwapStatus]:
    """Swaps and restarts of the engine, the newest first: why each happened, who waited, and why it failed."""
    return control.swaps()


@_routes.get("/traffic", summary="Show the requests for each variant")
async def list_traffic(control: _Controlled) -> list[VariantTraffic]:
    """Counted since the start of the server."""
    return await control.traffic()


@_routes.get("/usage", summary="Show what each tenant has used")
async def get_usage() -> UsageReport:
    """Sums by variant and tenant since the start of the server: the metrics `peanut_usage_...` for people."""
    return usage_report()


async def healthz() -> dict[str, str]:
    """Reports that the admin API responds. It does not check the engine, and needs no key."""
    return {"status": "ok"}


def admin_app(control: Control, key: str | Operators) -> FastAPI:
    """Build the admin API. Everything but GET /healthz needs `Authorization: Bearer KEY`, even the OpenAPI document.

    Args:
        control: the server.
        key: the admin key, or who has which.

    Raises `OptionError` if the key cannot be sent in a header.
    """
    app = FastAPI(
        title="peanut-serve admin API",
        description="List, swap, add and remove the variants of a running `peanut-serve --mode merged`.",
        version="1",
        openapi_url=f"{_routes.prefix}/openapi.json",
        docs_url=None,  # a browser would request these pages without the key
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
    app.add_api_route("/healthz", healthz, summary="Check that the admin API responds")
    app.include_router(_routes)
    app.add_middleware(_KeyGuard, operators=operators_of(key))
    return app


class _KeyGuard:
    """Checks the key before anything else: a dependency would run only after the body was read and parsed."""

    def __init__(self, app: ASGIApp, operators: Operators) -> None:
        self._app, self._operators = app, operators

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and scope["path"] != "/healthz":
            try:
                operator = self._operators.find(sent_key(scope))
                if (method := scope.get("method")) not in _READING:
                    operator.check_change(f"{method} {shown(scope['path'])}")
            except (UnauthorizedError, ForbiddenError) as error:
                await _key_refusal(error)(scope, receive, send)
                return
            caller.set(caller_of(scope, operator))
        await self._app(scope, _limited(receive), send)


def _key_refusal(error: ServingError) -> JSONResponse:
    is_unknown = isinstance(error, UnauthorizedError)
    kind, headers = ("AuthenticationError", {"WWW-Authenticate": "Bearer"}) if is_unknown else ("ForbiddenError", {})
    return _refusal(error.status, kind, str(error), headers)


def caller_of(scope: MutableMapping[str, Any], operator: Operator) -> Caller:
    """Who sent a request, an ASGI scope."""
    client = scope.get("client")
    return Caller(client[0] if client else None, operator.name)


def _limited(receive: Receive) -> Receive:
    """Refuse a body that is larger than any that the API needs, before it is in memory."""
    size = 0

    async def limited() -> Message:
        """Count the bytes of each part."""
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > _MOST_BYTES:
            raise HTTPException(413, f"the body is larger than {_MOST_BYTES >> 10} KiB")
        return message

    return limited


def _refusal(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    answer = ErrorAnswer(error=ErrorDetail(type=kind, message=message))
    return JSONResponse(answer.model_dump(), status, headers)


async def _answer_refusal(_: Request, error: PeanutError) -> Response:
    # an error of converters is always about its input
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
    return _refusal(500, "InternalError", f"unexpected {type(error).__name__}; see the server's log")
