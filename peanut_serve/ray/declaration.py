"""A fleet as Ray Serve's declarative config: what `serve deploy`, KubeRay and `serve status` work with."""

from typing import Any

from peanut_serve.ray.settings import FleetSettings

NAME = "peanut-serve"
_IN_PLACE = {"replicas": "num_replicas", "most_waiting": "max_queued_requests"}


def declaration(settings: FleetSettings, host: str, port: int) -> dict[str, Any]:
    """The config of a fleet that listens on a port of every node.

    What Serve changes without restarting an engine is not among `args`, whose change restarts all of them.
    """
    args = settings.model_dump(mode="json", exclude_defaults=True, exclude=set(_IN_PLACE))
    in_place = {theirs: getattr(settings, ours) for ours, theirs in _IN_PLACE.items()}
    return {
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": "peanut_serve.ray.app:build",
                "args": args,
                "deployments": [{"name": "Engine", **in_place}],
            }
        ],
    }
