"""What is used of vLLM is listed, and is what was tested; every work-around is still needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

from converters.errors import OptionError
from peanut_serve.vllm_plugin import contract
from peanut_serve.vllm_plugin.contract import INTERNALS, TESTED, WORKAROUNDS, Internal, changes, check_vllm

pytestmark = pytest.mark.slow  # vLLM is imported

PUBLIC = {"vllm.SamplingParams", "vllm.envs"}  # what vLLM documents


def imported() -> Iterator[str]:
    """Every name that is imported from vLLM, as module.name."""
    for file in (ROOT / "peanut_serve").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            assert not isinstance(node, ast.Import) or not any(a.name.startswith("vllm") for a in node.names), file


def test_everything_that_is_imported_is_listed() -> None:
    listed = {internal.path.replace(":", ".") for internal in INTERNALS}
    missing = {name for name in imported() if not any(f"{one}.".startswith(f"{name}.") for one in listed)}
    assert missing == PUBLIC


def test_the_installed_vllm_is_the_tested_one() -> None:
    assert list(changes()) == []
    assert check_vllm(allow_untested=False) == []
    assert f"vllm>={TESTED[0]},<0.33" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("internal", "change"),
    [
        (Internal("vllm.outputs:Nothing"), "vllm.outputs.Nothing: it is not there"),
        (Internal("vllm.nothing:At.all"), "vllm.nothing.At.all: it is not there"),
        (Internal("vllm.engine.protocol:EngineClient.abort", ("other",)), "EngineClient.abort: it has no parameter"),
        (Internal("vllm.outputs:RequestOutput", (), "0"), "RequestOutput: its source has changed .* expected 0"),
    ],
)
def test_what_has_changed_is_named(monkeypatch: pytest.MonkeyPatch, internal: Internal, change: str) -> None:
    monkeypatch.setattr(contract, "INTERNALS", (internal,))
    with pytest.raises(OptionError, match=f"{change}.*--allow-untested-vllm"):
        check_vllm(allow_untested=False)
    assert len(check_vllm(allow_untested=True)) == 1


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "installed_version", lambda: "9.9")
    with pytest.raises(OptionError, match="it is version 9.9, tested were 0.32.0"):
        check_vllm(allow_untested=False)


SCRIPTS = {
    "cpu-operators": """
from peanut_serve.vllm_plugin.lora.cpu_operators import is_affected
assert is_affected()
""",
    "lora-equality": """
from vllm.lora.request import LoRARequest
assert LoRARequest("one", 1, "a") == LoRARequest("one", 2, "b")
""",
    "key-prefixes": """
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX
assert not any("/tokenize".startswith(prefix) for prefix in GUARDED_PREFIX)
""",
    "invocations": """
import asyncio, json
from fastapi import FastAPI, Request
from httpx import ASGITransport, AsyncClient
import model_hosting_container_standards.sagemaker as standards
app = FastAPI()

@app.post("/invocations")
@standards.inject_adapter_id(adapter_path="model")
async def invocations(request: Request):
    return await request.json()

async def ask():
    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        return (await client.post("/invocations", json={"model": "mine"})).json()

assert asyncio.run(ask())["model"] != "mine"
""",
    "console-script": """
import importlib.metadata
try:
    importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    pass
else:
    assert False
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_work_around_is_still_needed(name: str) -> None:
    """If this fails, vLLM was mended: remove the work-around. Runs where nothing is worked around yet."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPTS[name]], capture_output=True, text=True, timeout=120, env=plain_environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]


def plain_environment() -> dict[str, str]:
    import os

    return {**os.environ, "VLLM_PLUGINS": ""}


def test_every_work_around_has_a_test() -> None:
    elsewhere = {"mixture-reload": "test_swap_modes.py"}  # it needs an engine
    assert set(SCRIPTS) | set(elsewhere) == set(WORKAROUNDS)
    assert "def test_a_mixture_of_experts_is_refused" in Path(__file__).with_name("test_swap_modes.py").read_text()
    for workaround in WORKAROUNDS.values():
        roots = (ROOT, ROOT / "peanut_serve" / "vllm_plugin")
        assert any((root / workaround.where).is_file() for root in roots), workaround.where
