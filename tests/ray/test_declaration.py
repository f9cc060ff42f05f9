"""The config that `peanut-serve deploy` writes, applied by Serve as `serve deploy` does, with fake engines."""

import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from support.engines.remains import until
from support.fleet import fake_server

from peanut_serve.ray.child import free_port
from peanut_serve.ray.declaration import declaration
from peanut_serve.ray.settings import FleetSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def config(tmp_path: Path) -> Iterator[dict[str, Any]]:
    engine = {
        "command": [sys.executable, fake_server.__file__],
        "options": ["--swap", "0", "--journal", str(tmp_path / "journal")],
    }
    settings = FleetSettings.model_validate({"engine": engine, "replicas": 2, "cpus": 0.1, "logs": tmp_path})
    os.environ |= {"RAY_worker_niceness": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120"}
    ray.init("local", num_cpus=8, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        config = declaration(settings, "127.0.0.1", free_port())
        serve.start(http_options=config["http_options"], logging_config={"log_level": "ERROR"})
        yield config
    finally:
        serve.shutdown()
        ray.shutdown()


def test_replicas_and_queues_change_without_a_restart(config: dict[str, Any]) -> None:
    apply(config)
    address = f"http://127.0.0.1:{config['http_options']['port']}"
    assert httpx.post(f"{address}/v1/completions", json={"model": "v1"}, timeout=60).json()["variant"] == "v1"
    engines = replicas()
    assert len(engines) == 2
    changed = copy.deepcopy(config)
    changed["applications"][0]["deployments"][0] |= {"num_replicas": 3, "max_queued_requests": 7}
    apply(changed)
    assert until(lambda: len(replicas()) == 3, 60)
    assert engines < replicas(), "an engine was restarted"
    assert httpx.post(f"{address}/v1/completions", json={"model": "v1"}, timeout=60).json()["variant"] == "v1"


def apply(config: dict[str, Any]) -> None:
    """Until Serve says that the fleet runs."""
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=True)


def replicas() -> set[str]:
    """The engines that run, by the names of their replicas."""
    controller = _get_global_client()._controller
    details = ray.get(controller.get_serve_instance_details.remote())
    found = details["applications"]["peanut-serve"]["deployments"]["Engine"]["replicas"]
    return {one["replica_id"] for one in found if one["state"] == "RUNNING"}
