"""The manifests of the page on gateways agree with each other, and with the options, routes and metrics.

tests/vllm_plugin/test_swap_modes.py finds the metrics that they name at a real server.
"""

from pathlib import Path

import pytest
from support.commands import Run
from support.project.documents import GATEWAYS, rows
from support.server.gateway import MANIFESTS, metric_specs

from peanut_serve.swapping.metrics import STATE
from peanut_serve.web.routes import Access, access_to

POD = MANIFESTS["Deployment"]["spec"]["template"]
SERVER = POD["spec"]["containers"][0]


def test_the_pool_selects_the_pods() -> None:
    pool = MANIFESTS["InferencePool"]["spec"]
    deployment = MANIFESTS["Deployment"]["spec"]
    assert deployment["selector"]["matchLabels"] == pool["selector"]["matchLabels"]
    assert pool["selector"]["matchLabels"].items() <= POD["metadata"]["labels"].items()
    ports = {port["number"] for port in pool["targetPorts"]}
    assert ports == {port["containerPort"] for port in SERVER["ports"]}
    assert f"--port={ports.pop()}" in SERVER["args"]


def test_the_probes_are_open_routes() -> None:
    probes = {name: SERVER[name]["httpGet"] for name in ("readinessProbe", "livenessProbe", "startupProbe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "readinessProbe": "/ready", "livenessProbe": "/health", "startupProbe": "/health",
    }  # fmt: skip
    for probe in probes.values():
        assert access_to(probe["path"]) is Access.OPEN
        assert {"containerPort": probe["port"]} in SERVER["ports"]


def test_the_picker_knows_the_engine_of_the_pods() -> None:
    picker = MANIFESTS["EndpointPickerConfig"]
    parameters = next(one["parameters"] for one in picker["plugins"] if one["type"] == "core-metrics-extractor")
    engines = [engine["name"] for engine in parameters["engineConfigs"]]
    assert engines == [POD["metadata"]["labels"]["llm-d.ai/engine-type"]]
    plugins = {one["type"] for one in picker["plugins"]}
    used = {one["pluginRef"] for profile in picker["schedulingProfiles"] for one in profile["plugins"]}
    assert used <= plugins
    own = {name for name in metric_specs().values() if name.startswith("peanut_")}
    assert own == {"peanut_queued_requests"}
    assert {*own, "vllm:lora_requests_info"} <= {family.name for family in STATE.describe()}


def test_what_is_read_stands_in_the_table() -> None:
    table = " ".join(cell for row in rows(GATEWAYS.section("What is read from where")) for cell in row)
    assert all(f"`{name}`" in table for name in metric_specs().values())


@pytest.mark.slow
def test_the_servers_start_as_they_say(folders: Path, run_here: Run) -> None:
    (folders / "tasks").mkdir(exist_ok=True)
    (folders / "gsm8k").rename(folders / "tasks" / "gsm8k")
    places = {"/models/base": str(folders / "llama2-7b"), "/models/tasks": str(folders / "tasks")}
    arguments = [argument.split("=", 1) for argument in SERVER["args"]]
    words = [word for name, value in arguments for word in (name, places.get(value, value))]
    done = run_here(*SERVER["command"], *words, "--dry-run")
    assert "variants: gsm8k" in done.stdout, done.stderr
    assert "--host 0.0.0.0" in done.stdout
