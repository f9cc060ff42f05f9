"""The Serve application of classifiers: `import_path: peanut_serve.ray.classifiers.app:build`."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from peanut_serve.ray.app import ROUTING, logging_config
from peanut_serve.ray.classifiers.front import ClassifierFront
from peanut_serve.ray.classifiers.replica import ClassifierReplica
from peanut_serve.ray.classifiers.settings import ClassifierSettings

_ONGOING = 4096  # the replicas queue: a batch needs requests to choose from


def build(args: dict[str, Any]) -> Application:
    """The front and its replicas; `args` are ClassifierSettings.

    Raises `pydantic.ValidationError` for wrong settings, before anything starts.
    """
    settings = ClassifierSettings.model_validate(args)
    given = settings.model_dump(mode="json")
    replica = serve.deployment(
        name="Classifier",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus},
        max_ongoing_requests=_ONGOING,
        max_queued_requests=_ONGOING,
        max_constructor_retry_count=1,
        user_config=settings.tunables.model_dump(),
        request_router_config=RequestRouterConfig(**ROUTING),
        logging_config=logging_config(settings.log_format),
    )(ClassifierReplica)
    front = serve.deployment(
        name="ClassifierFront",
        num_replicas=1,  # as of a fleet of engines
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": 0},
        user_config=settings.of_front(),
        logging_config=logging_config(settings.log_format),
    )(ClassifierFront)
    return front.bind(replica.bind(given), given)
