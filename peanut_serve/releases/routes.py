"""The routes of releases below /admin/v1 of the admin port.

They are not below /variants/NAME: a name may have slashes, and `release` may be the last part of one.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request, Security

from peanut_serve.releases.schema import Promotion, Reason, ReleaseControl, ReleaseStatus, Staging, Weighing
from peanut_serve.web.admin import ALWAYS, BEARER, refusals


async def _releases(request: Request) -> ReleaseControl:
    control: ReleaseControl = request.app.state.releases
    return control


_Controlled = Annotated[ReleaseControl, Depends(_releases)]

_CHANGING = refusals(404, 409, 422)
_SERVING = refusals(404, 409, 422, 503)

# coroutines with `:path` in names and a verb at the end, as in `peanut_serve.web.admin`
_routes = APIRouter(prefix="/admin/v1/releases", dependencies=[Security(BEARER)], responses=ALWAYS)


@_routes.get("", summary="List the releases")
async def list_releases(control: _Controlled) -> list[ReleaseStatus]:
    """The latest release of every variant that had one."""
    return control.releases()


@_routes.get("/{name:path}", summary="Show the release of a variant", responses=refusals(404))
async def get_release(control: _Controlled, name: str) -> ReleaseStatus:
    """The latest one, open or not, with the answers to its canary set."""
    return control.release(name)


@_routes.post("/{name:path}/hold", summary="Hold a variant at its version", status_code=204, responses=_SERVING)
async def hold_variant(control: _Controlled, name: str) -> None:
    """Changes of its files are ignored until it is reloaded. Staging a version does the same."""
    await control.hold(name)


@_routes.post("/{name:path}/stage", summary="Stage a new version", responses=_SERVING)
async def stage_release(control: _Controlled, name: str, staging: Staging | None = None) -> ReleaseStatus:
    """Returns when it has been evaluated, and has answered its canary set, which can take minutes."""
    given = staging or Staging(source=None, digest=None)
    return await control.stage(name, given.source, given.digest)


@_routes.post("/{name:path}/check", summary="Ask the canary set again", responses=_CHANGING)
async def check_release(control: _Controlled, name: str) -> ReleaseStatus:
    """Returns when the staged version has answered all prompts, which can take minutes."""
    return await control.check(name)


@_routes.post("/{name:path}/weight", summary="Give the new version a share", responses=_CHANGING)
async def weigh_release(control: _Controlled, name: str, weighing: Weighing) -> ReleaseStatus:
    """Failures of the share are counted from now on."""
    return await control.weigh(name, weighing)


@_routes.post("/{name:path}/promote", summary="Move a variant to the new version", responses=_SERVING)
async def promote_release(control: _Controlled, name: str, promotion: Promotion | None = None) -> ReleaseStatus:
    """The version before is kept for a rollback."""
    return await control.promote(name, (promotion or Promotion(force=False)).force)


@_routes.post("/{name:path}/rollback", summary="Roll a release back", responses=_SERVING)
async def rollback_release(control: _Controlled, name: str, why: Reason | None = None) -> ReleaseStatus:
    """Ends an open release, or returns from a promoted one. The variant stays held until it is reloaded."""
    return await control.rollback(name, (why or Reason(reason=None)).reason)


def add_releases(app: FastAPI, control: ReleaseControl) -> None:
    """Add the routes to the application of the admin port, whose key protects them."""
    app.state.releases = control
    app.include_router(_routes)
