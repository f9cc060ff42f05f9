"""Every route of vLLM's own app is in our list, so that none is served that nobody thought about."""

import subprocess
import sys

import pytest

from peanut_serve.web.routes import Access, access_to, is_known, refusal_of

# vLLM's app with the routes of every task and every switch, without an engine
SCRIPT = """
import os
os.environ["VLLM_SERVER_DEV_MODE"] = "1"
os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
from typing import get_args
from vllm.config import ModelConfig, ProfilerConfig
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.tasks import FRONTEND_TASKS, GENERATION_TASKS, POOLING_TASKS
from vllm.utils.argparse_utils import FlexibleArgumentParser
args = make_arg_parser(FlexibleArgumentParser()).parse_args(
    ["--enable-fault-tolerance", "--enable-tokenizer-info-endpoint", "--profiler-config.profiler", "torch",
     "--profiler-config.torch_profiler_dir", "/tmp"]
)
tasks = (*GENERATION_TASKS, *POOLING_TASKS, *FRONTEND_TASKS)
for route in build_app(args, tasks).routes:
    print("ROUTE", ",".join(sorted(getattr(route, "methods", None) or ["WEBSOCKET"])), route.path)
"""


@pytest.fixture(scope="module")
def routes() -> dict[str, str]:
    """Path -> methods."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    found = [line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.startswith("ROUTE ")]
    assert len(found) > 50, done.stderr[-3000:]
    return {path: methods for methods, path in found}


@pytest.mark.slow  # vLLM is imported
def test_every_route_of_vllm_is_listed(routes: dict[str, str]) -> None:
    assert [path for path in routes if not is_known(path)] == []
    for path, methods in routes.items():
        if "WEBSOCKET" in methods and path != "/metrics":
            assert access_to(path) is Access.REFUSED


@pytest.mark.slow
def test_a_route_that_runs_the_model_waits_for_its_weights(routes: dict[str, str]) -> None:
    """Judged by what vLLM's routes are for: those that take a prompt, and are not refused."""
    for part in (
        "completions",
        "responses",
        "messages",
        "generate",
        "embed",
        "score",
        "rerank",
        "classify",
        "pooling",
    ):
        for path in routes:
            last = path.rsplit("/", 1)[-1]
            if part in last and "{" not in path and refusal_of(path) is None:
                assert access_to(path) is Access.ANSWER, path
