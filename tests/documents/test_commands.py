"""Every command and snippet of the documents runs, on tiny models under the documents' names."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path

import pytest
from support.commands import Run, run
from support.hub.server import hub_settings, serve_hub
from support.paths import ROOT
from support.project.documents import CONTRIBUTING, CONVERTERS, EXECUTED, README, SERVING, Document
from support.server.admin import KEY, FakeControl, serving_app
from support.tiny_models import Pair

from peanut_serve.web.admin import admin_app

pytestmark = pytest.mark.slow  # runs every command of the documents

PREDICT, CTL, DEPLOY = "peanut-serve predict ", "peanut-serve ctl ", "peanut-serve deploy "


def kind(command: str) -> str:
    """Which test runs a command."""
    if command.endswith("--help"):
        return "help"
    if "--stream" in command or "--push-to-hub" in command:
        return "hub"
    if command.startswith(CTL):
        return "ctl"
    if command.startswith("peanut-serve classify "):
        return "classify"
    if command.startswith("peanut-serve ") and not command.startswith((PREDICT, DEPLOY)):
        return "serve"
    return "job"


def commands(document: Document, wanted: str) -> list[str]:
    return [command for command in document.commands if kind(command) == wanted]


def having(found: Callable[[Document], object]) -> pytest.MarkDecorator:
    """For every document that has some."""
    some = [document for document in EXECUTED if found(document)]
    assert some
    return pytest.mark.parametrize("document", some, ids=lambda document: document.name)


def export_tasks(run_here: Run) -> None:
    """The ONNX folder that documents on serving begin with, by the command that makes it."""
    export = next(command for command in CONVERTERS.commands if command.endswith("-o ./tasks-onnx"))
    done = run_here(*shlex.split(export))
    assert done.returncode == 0, done.stderr


def test_no_command_was_lost() -> None:
    jobs = {document.name: len(commands(document, "job")) for document in EXECUTED}
    assert jobs["converters/README.md"] >= 34
    assert jobs["peanut_serve/README.md"] >= 1
    assert jobs["README.md"] >= 8
    assert len(commands(CONVERTERS, "hub")) >= 2
    assert len(commands(SERVING, "serve")) >= 3
    assert len(commands(SERVING, "ctl")) >= 10


@having(lambda document: commands(document, "job"))
def test_the_jobs(folders: Path, run_here: Run, document: Document) -> None:
    if document is SERVING:
        export_tasks(run_here)
    if document is not CONVERTERS:
        shutil.copytree(folders / "gsm8k", folders / "tasks" / "gsm8k")
    for command in commands(document, "job"):
        done = run_here(*shlex.split(command))
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    wanted = {
        README: ["llama2-7b-gsm8k", "llama2-7b-gsm8k-style", "gsm8k-lora", "pets-onnx/model.onnx"],
        CONVERTERS: [
            *(f"llama2-7b-{name}/config.json" for name in ("gsm8k", "math14k", "qkv", "checkpoint-200", "alpaca")),
            *(f"llama2-7b-{name}/config.json" for name in ("ablation", "sine", "gsm8k-style", "dora", "ia3")),
            *(f"vit-base-{name}/config.json" for name in ("pets", "flowers", "cars")),
            *(f"{name}/config.json" for name in ("small", "food-merged", "roberta-base-mrpc")),
            *(f"{name}/adapter_config.json" for name in ("flowers-peft", "gsm8k-lora", "dora-lora")),
            "gsm8k.png", "pets-onnx/model.onnx", "pets-int8/model_quantized.onnx", "pets-web/onnx/model.onnx",
            "tasks-onnx/flowers.onnx_adapter",
        ],
        SERVING: ["fleet.yaml", "classifiers.yaml"],
    }  # fmt: skip
    for path in wanted.get(document, []):
        assert (folders / path).exists(), path
    assert not (folders / "planned").exists()


@having(lambda document: commands(document, "hub"))
def test_the_commands_that_need_a_hub(folders: Path, pair: Pair, document: Document) -> None:
    with serve_hub({"meta-llama/Llama-2-7b-hf": folders / "llama2-7b"}) as hub:
        hub.uploads.writers["hf_mine"] = {"me"}
        for command in commands(document, "hub"):
            done = run(*shlex.split(command), **hub_settings(hub, pair), HF_TOKEN="hf_mine")
            assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert hub.uploads.repositories["me/llama2-gsm8k"].private
    assert (folders / "streamed" / "config.json").exists()


@having(lambda document: commands(document, "serve"))
def test_the_commands_that_serve(folders: Path, run_here: Run, document: Document) -> None:
    """What they tell vLLM; test_serving.py starts one."""
    shutil.copytree(folders / "gsm8k", folders / "tasks" / "gsm8k")
    for command in commands(document, "serve"):
        done = run_here(*shlex.split(command), "--dry-run")
        assert "variants: gsm8k" in done.stdout, done.stderr
        assert "vllm serve llama2-7b --host 127.0.0.1" in done.stdout
        assert ("--worker-extension-cls" in done.stdout) == ("--mode" in command)
        assert ("--enable-lora" in done.stdout) == ("merged" not in command)


@having(lambda document: commands(document, "ctl"))
def test_the_commands_that_control(monkeypatch: pytest.MonkeyPatch, run_here: Run, document: Document) -> None:
    """Beside an admin API; test_swapping.py has the one of a server with an engine."""
    monkeypatch.setenv("PEANUT_ADMIN_KEY", KEY)
    control = FakeControl()
    control.names.append("gsm8k")
    with serving_app(admin_app(control, KEY)) as url:
        monkeypatch.setenv("PEANUT_ADMIN_URL", url)
        for command in commands(document, "ctl"):
            done = run_here(*shlex.split(command))
            assert done.returncode == 0, f"{command}\n{done.stderr}"


@having(lambda document: commands(document, "classify"))
def test_the_commands_that_serve_onnx_models(folders: Path, run_here: Run, document: Document) -> None:
    """What they would serve; test_classify_process.py starts such a server."""
    export_tasks(run_here)
    pets = next(command for command in README.commands if command.endswith("--format onnx"))
    assert run_here(*shlex.split(pets)).returncode == 0
    for command in commands(document, "classify"):
        words = [word for word in shlex.split(command) if word != "--dry-run"]
        done = run_here(*words, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert "image-classification" in done.stdout


@having(lambda document: commands(document, "help"))
def test_the_help(run_here: Run, document: Document) -> None:
    for command in commands(document, "help"):
        done = run_here(*shlex.split(command))
        assert done.returncode == 0
        assert "Usage: " in done.stdout


@pytest.mark.slow
@having(lambda document: document.shell_commands)
def test_the_blocks(smollm2: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch, document: Document) -> None:
    """Servers by what they tell vLLM; test_serving.py and test_swapping.py start such servers, and ask them."""
    monkeypatch.chdir(ROOT)
    for command in document.shell_commands:
        program, *words = shlex.split(command)
        if program == "peanut-serve":
            done = run_here(program, *words, "--dry-run")
            assert "variants: smollm2-json, smollm2-math, smollm2-upper" in done.stdout, done.stderr
        elif program == "curl":
            request = json.loads(words[-1])
            assert (ROOT / "examples" / "adapters" / request["model"]).is_dir()
            assert words[0] == "http://127.0.0.1:8000/v1/chat/completions"
        elif program.endswith("python"):
            assert words[:2] == ["-m", "pytest"]
            assert all((ROOT / path).exists() for path in words[2:])
        else:
            assert program == "make"


def test_both_documents_start_the_same_server() -> None:
    """The one in README.md is started, and asked, by test_serving.py."""
    assert README.blocks("sh") == SERVING.blocks("sh")
    assert [shlex.split(block)[0] for block in README.blocks("sh")] == ["peanut-serve", "curl", "peanut-serve"]


@having(lambda document: document.blocks("python"))
def test_the_snippets(folders: Path, run_here: Run, document: Document) -> None:
    if document is SERVING:
        export_tasks(run_here)
    for snippet in document.blocks("python"):
        exec(compile(snippet, document.name, "exec"), {"__name__": "__main__"})
    wanted = {README: "merged/config.json", CONVERTERS: "pets-as-onnx/model.onnx"}
    assert document not in wanted or (folders / wanted[document]).exists()


@having(lambda document: document)
def test_the_make_targets_exist(document: Document) -> None:
    """`make demo`, `make lint` and `make test` are run whole by .ci/run."""
    found = [command.split() for command in [*document.shell_commands, *document.inline] if command[:5] == "make "]
    targets = list(dict.fromkeys(target for _, target in found))
    assert document is not README or targets == ["demo", "test-fast", "test"]
    assert document is not CONTRIBUTING or {"demo", "lint", "test-fast", "test", "soak", "test-gpu"} <= set(targets)
    ci = (ROOT / ".ci" / "run").read_text()
    for target in targets:
        assert target not in ("demo", "lint", "test") or f"make {target}" in ci
        done = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": ""}
        )
        assert done.returncode == 0, done.stderr


def test_the_extras_exist() -> None:
    extras = set(metadata("peanut-serve").get_all("Provides-Extra") or ())
    named = {
        extra
        for document in EXECUTED
        for group in re.findall(r"pip install '\.\[([\w,-]+)\]'", document.text)
        for extra in group.split(",")
    }
    assert {"vllm", "onnx", "plot"} <= named <= extras


@pytest.mark.slow
def test_the_demo_shows_what_the_readme_says(smollm2: Path, tmp_path: Path, run_here: Run) -> None:
    adapter = ROOT / "examples" / "adapters" / "smollm2-json"
    done = run_here("peanut-merge", "--base", smollm2, "--adapter", adapter, "-o", tmp_path / "merged")
    assert done.returncode == 0
    script = ROOT / "examples" / "side_by_side.py"
    environment = {**os.environ, "COLUMNS": "200"}
    shown = subprocess.run(
        [sys.executable, script, smollm2, tmp_path / "merged"], capture_output=True, text=True, env=environment
    )
    assert shown.returncode == 0, shown.stderr
    assert '{"answer": "Rome"}' in shown.stdout
    assert '{"answer": "green"}' in shown.stdout
    assert shown.stdout.count('{"answer"') == 3  # the base answers in prose, whose words differ from CPU to CPU
