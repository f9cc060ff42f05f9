"""θ of versions that an engine does not have, from other engines of the fleet."""

import asyncio
import logging
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from peanut_serve.ray.fleet.asking import ask_all
from peanut_serve.variants.kept_theta import add_theta, read_theta

logger = logging.getLogger("ray.serve")

_GLANCE = 10.0  # seconds
_TRANSFER = 300.0


class FleetTheta:
    """Finds θ on this machine first, then at other replicas.

    Args:
        own: the state folder of the engine; those of other engines of the machine are beside it.
        engines: the replicas of the fleet.
    """

    def __init__(self, own: Path, engines: DeploymentHandle[Any]) -> None:
        self._own, self._engines = own, engines

    async def fetch(self, digest: str) -> bool:
        """Put θ of a version into the state folder; False if no replica has it."""
        try:
            files = await asyncio.to_thread(self._beside, digest) or await self._from_peers(digest)
            if files is None:
                return False
            await asyncio.to_thread(add_theta, self._own, digest, files)
        except (OSError, ValueError, TimeoutError, RayError, RayServeException) as error:
            logger.warning("version %s is not available: %s: %s", digest[:12], type(error).__name__, error)
            return False
        return True

    def _beside(self, digest: str) -> dict[str, bytes] | None:
        found = (read_theta(folder, digest) for folder in sorted(self._own.parent.iterdir()))
        return next((files for files in found if files), None)

    async def _from_peers(self, digest: str) -> dict[str, bytes] | None:
        holders = await ask_all(self._engines, "has_version", digest, within=_GLANCE)
        holder = next((entry["replica"] for entry in holders if entry.get("has")), None)
        if holder is None:
            return None
        sent = await ask_all(self._engines, "send_version", digest, holder, within=_TRANSFER)
        return next((entry["files"] for entry in sent if entry.get("files")), None)
