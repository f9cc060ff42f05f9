"""The Serve application of a fleet: `import_path: peanut_serve.ray.app:build`, with FleetSettings as `args`."""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from peanut_serve.ray.front import Front
from peanut_serve.ray.replica import EngineReplica
from peanut_serve.ray.settings import FleetSettings
from peanut_serve.signals.json_logs import LogFormat

ROUTING: dict[str, Any] = {
    "request_router_class": "peanut_serve.ray.router:VariantRouter",
    "request_routing_stats_period_s": 0.5,  # how often replicas tell what is resident; Ray's default is 10
}
_ONGOING = 4096  # the engines queue, as they know what a swap costs; Ray must not


def logging_config(log_format: LogFormat) -> dict[str, Any]:
    """Settings of Ray's `LoggingConfig` for a deployment."""
    return {"enable_access_log": False, **({"encoding": "JSON"} if log_format == "json" else {})}


def build(args: dict[str, Any]) -> Application:
    """The front and its engines. Raises `pydantic.ValidationError` for wrong settings, before anything starts."""
    return application(FleetSettings.model_validate(args))


def application(settings: FleetSettings, routing: Mapping[str, Any] = ROUTING) -> Application:
    """The same, maybe with other settings of Ray's `RequestRouterConfig`."""
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
        request_router_config=RequestRouterConfig(**routing),
        logging_config=logging_config(settings.log_format),
    )(EngineReplica)
    front = serve.deployment(
        name="Front",
        num_replicas=1,  # the router knows what was sent where; a second one would not see it
        max_ongoing_requests=_ONGOING,
        health_check_period_s=2,  # Ray's default is 10: nobody is answered until a lost one is missed
        health_check_timeout_s=30,
        ray_actor_options={"num_cpus": 0},
        user_config=settings.of_front(),
        logging_config=logging_config(settings.log_format),
    )(Front)
    folders = [str(folder) if folder else None for folder in (settings.logs, settings.state)]
    engines = engine.bind(settings.engine.model_dump(mode="json"), *folders)
    return front.bind(engines, settings.model_dump(mode="json"))
