"""The Serve application of a fleet: `import_path: peanut_serve.ray.app:build`, with FleetSettings as `args`."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from peanut_serve.ray.front import Front
from peanut_serve.ray.replica import EngineReplica
from peanut_serve.ray.settings import FleetSettings

ROUTING: dict[str, Any] = {
    "request_router_class": "peanut_serve.ray.router:VariantRouter",
    "request_routing_stats_period_s": 0.5,  # how often replicas tell what is resident; Ray's default is 10
}
_ONGOING = 4096  # the engines queue, as they know what a swap costs; Ray must not
QUIET = {"enable_access_log": False}


def build(args: dict[str, Any]) -> Application:
    """The front and its engines. Raises `pydantic.ValidationError` for wrong settings, before anything starts."""
    settings = FleetSettings.model_validate(args)
    engine = serve.deployment(
        name="Engine",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=_ONGOING,
        max_queued_requests=settings.most_waiting,
        max_constructor_retry_count=1,  # what failed once, after minutes, would fail again
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=settings.engine.stop_seconds + 10,
        graceful_shutdown_wait_loop_s=0.2,
        request_router_config=RequestRouterConfig(**ROUTING),
        logging_config=QUIET,
    )(EngineReplica)
    front = serve.deployment(
        name="Front",
        num_replicas=1,  # the router knows what was sent where; a second one would not see it
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
    )(Front)
    keys = [str(file) if file else None for file in (settings.key_file, settings.admin_key_file)]
    folders = [str(folder) if folder else None for folder in (settings.logs, settings.state)]
    return front.bind(engine.bind(settings.engine.model_dump(mode="json"), *folders), *keys)
