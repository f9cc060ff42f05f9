"""A fleet as Ray Serve's declarative config: what `serve deploy`, KubeRay and `serve status` work with."""

from typing import Any

from peanut_serve.ray.classifiers.settings import ClassifierSettings
from peanut_serve.ray.settings import FleetSettings

NAME = "peanut-serve"


def declaration(settings: FleetSettings | ClassifierSettings, host: str, port: int) -> dict[str, Any]:
    """The config of a fleet that listens on a port of every node.

    What Serve changes without restarting an engine is not among `args`, whose change restarts all of them.
    """
    return {
        "http_options": {"host": host, "port": port},
        **({"logging_config": {"encoding": "JSON"}} if settings.log_format == "json" else {}),
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": settings.import_path,
                "args": settings.args(),
                "deployments": settings.in_place(),
            }
        ],
    }
