"""A fleet on this machine: a Ray cluster of one node, in the foreground, that ends with this process."""

import importlib
import logging
import math
import os
import signal
import threading
from types import FrameType

from converters.errors import MissingDependencyError, OptionError
from peanut_serve.errors import EngineStartError
from peanut_serve.ray.classifiers.settings import ClassifierSettings
from peanut_serve.ray.declaration import NAME
from peanut_serve.ray.settings import FleetSettings
from peanut_serve.signals.json_logs import LogFormat

# Ray reads them when it is imported. Engines are not to be niced, and a proxy on a busy machine takes its time.
# Nothing in the front and in replicas blocks, so that they can do without the threads that Ray has for code that may
VARIABLES = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def serve_here(settings: FleetSettings | ClassifierSettings, host: str, port: int) -> None:
    """Serve a fleet until this process gets SIGINT or SIGTERM. Then, or if it cannot start, everything is ended.

    Raises:
        EngineStartError: the engines did not start.
        MissingDependencyError: Ray is not installed.
        OptionError: the machine has fewer GPUs than the fleet needs.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import serve

        module, _, name = settings.import_path.partition(":")
        build = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MissingDependencyError(f"a fleet needs Ray Serve ({error}): pip install 'peanut-serve[ray]'") from None
    stopped = threading.Event()

    def listen() -> None:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, stop)

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        raise KeyboardInterrupt  # out of whatever waits

    cpus = max(math.ceil(settings.replicas * settings.cpus), os.cpu_count() or 1)  # of the machine, or shared
    listen()
    try:
        _start_ray(cpus, host, port, settings.log_format)
        listen()  # again: Ray has set handlers of its own
        gpus = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
        if settings.replicas * settings.gpus > gpus:
            raise OptionError(
                f"the fleet needs {settings.replicas * settings.gpus:g} GPUs ({settings.replicas} replicas with "
                f"{settings.gpus:g} each), and this machine has {gpus:g}"
            )
        serve.run(build(settings.model_dump(mode="json")), name=NAME, route_prefix="/")
        print(f"{settings.replicas} replicas serve on http://{host}:{port}", flush=True)
        stopped.wait()
    except KeyboardInterrupt:
        pass
    except RuntimeError:  # of Serve; what the deployments say has the last lines of an engine's log
        messages = [one.message for one in serve.status().applications[NAME].deployments.values()]
        told = [message.rpartition(f"{EngineStartError.__name__}: ")[2].strip() for message in messages if message]
        raise EngineStartError("\n".join(["the fleet did not start", *told])) from None
    finally:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)  # the end takes a while, and is bounded
        if ray.is_initialized():
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


def _start_ray(cpus: int, host: str, port: int, log_format: LogFormat) -> None:
    """Start a node of Ray, and Serve on it. Raises `EngineStartError`."""
    import ray
    from ray import serve

    try:
        ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        logs = {"log_level": "WARNING", **({"encoding": "JSON"} if log_format == "json" else {})}
        serve.start(http_options={"host": host, "port": port}, logging_config=logs)
    except Exception as error:  # Ray raises many kinds, plain `Exception` among them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EngineStartError(f"Ray did not start on this machine: {reason}") from None
