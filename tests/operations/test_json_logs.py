"""`--log-format json`: every line is a JSON object, of every logger and process, and none has a key."""

import json
import logging
import os
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support.classify.stand_ins import stand_in
from support.commands import Run
from support.paths import ROOT
from support.tiny_models import Pair

from peanut_serve.cli import serve
from peanut_serve.cli.serve import _json_logs
from peanut_serve.ray.classifiers.settings import ClassifierSettings
from peanut_serve.ray.declaration import declaration
from peanut_serve.settings.serving import ServeOptions
from peanut_serve.signals.json_logs import JsonFormatter, LogLines, json_logging, write_configuration

KEY = "a-key-that-nobody-may-read"


def entry(logger: str, message: str, *arguments: object, **more: object) -> dict[str, object]:
    """What a record becomes."""
    record = logging.getLogger(logger).makeRecord(logger, logging.INFO, __file__, 1, message, arguments, None, **more)
    (line,) = JsonFormatter().format(record).splitlines()
    return json.loads(line)


def test_a_line() -> None:
    found = entry("vllm.engine", "a\nb %s", "\udce9 \u2028")
    assert found["message"] == "a\nb \udce9 \u2028"
    assert (found["level"], found["logger"], found["pid"]) == ("INFO", "vllm.engine", os.getpid())
    assert datetime.fromisoformat(str(found["time"])).utcoffset() == timedelta(0)


def test_facts_are_fields() -> None:
    message = "swap variant=%s digest=%s outcome=done tensors=%d 100%% %s error=%s"
    found = entry("vllm.peanut_serve", message, "v1", "d1", 3, "apply=0.1", ValueError("no"))
    facts = {"variant": "v1", "digest": "d1", "tensors": 3, "error": "no"}
    assert {name: found[name] for name in facts} == facts
    assert "apply" not in found
    assert entry("vllm.other", "variant=%s", "v1").keys() == entry("vllm.other", "nothing").keys()
    extra = entry("vllm.peanut_serve", "pid=%d", 7, extra={"swap": [1], "level": "mine"})
    assert (extra["swap"], extra["level"], extra["pid"]) == ("[1]", "INFO", os.getpid()), "nothing is overwritten"


def test_an_exception_is_one_field() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    found = json.loads(JsonFormatter().format(record))
    assert found["message"] == "failed"
    assert found["exception"].startswith("Traceback (most recent call last)")
    assert found["exception"].endswith("ValueError: first\nsecond")


def test_what_is_printed_for_people_is_one_line_each(caplog: pytest.LogCaptureFixture) -> None:
    lines = LogLines(logging.getLogger("peanut_serve"))
    lines.write("note: v1 will\nnot be served\n")
    lines.write("\n")
    assert [record.getMessage() for record in caplog.records] == ["note: v1 will not be served"]


PROCESS = """
import logging, sys, warnings
from argparse import Namespace
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging, init_logger
from vllm.utils.system_utils import decorate_logs
configure_logging(LoggingConfig())
decorate_logs("EngineCore")
init_logger("vllm.v1.engine.core").info_once("of %s", "vLLM")
logging.getLogger("vllm.peanut_serve").warning("variant=%s is here", "v1")
logging.getLogger("vllm.quiet").debug("not shown")
warnings.warn("of Python")
logging.getLogger("other.library").error("of another\\nlibrary")
import uvicorn
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
arguments = Namespace(logging_config=LoggingConfig(), disable_access_log_for_endpoints=None)
uvicorn.Config("x:y", log_config=get_uvicorn_log_config(arguments))
logging.getLogger("uvicorn.error").info("of uvicorn")
logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", "/health", "1.1", 200)
"""


@pytest.mark.slow  # imports vLLM
def test_the_loggers_of_a_process_of_vllm(tmp_path: Path) -> None:
    file = write_configuration(json_logging(), tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_LOGGING_CONFIG_PATH": str(file)}
    command = [sys.executable, "-W", "always", "-c", PROCESS]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    by_logger = {one["logger"]: one for one in found}
    assert by_logger["vllm.v1.engine.core"]["message"] == "of vLLM"
    assert by_logger["vllm.v1.engine.core"]["process"] == "EngineCore"
    assert by_logger["vllm.peanut_serve"]["variant"] == "v1"
    # torch may warn of something, too
    assert any("of Python" in one["message"] for one in found if one["logger"] == "py.warnings")
    assert by_logger["other.library"]["message"] == "of another\nlibrary"
    assert by_logger["uvicorn.error"]["message"] == "of uvicorn"
    access = by_logger["uvicorn.access"]
    assert (access["client"], access["method"], access["path"], access["status"]) == (
        "1.2.3.4:5",
        "GET",
        "/health",
        200,
    )
    assert len([one for one in found if one["logger"] == "uvicorn.access"]) == 1
    assert "vllm.quiet" not in by_logger


def test_what_vllm_is_started_with(
    pair: Pair, tmp_path: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(serve, "run_vllm", lambda arguments: started.append(os.environ["VLLM_LOGGING_CONFIG_PATH"]))
    monkeypatch.setattr(serve, "check_endpoints", lambda allow_untested: None)
    monkeypatch.setattr(serve, "use_json_logs", lambda logs: None)  # it is for the whole process
    monkeypatch.setattr(serve, "console", SimpleNamespace(err=SimpleNamespace(print=lambda *_, **__: None)))
    (tmp_path / "tasks").mkdir()
    command = ["peanut-serve", "--base", pair.base, "--adapters", tmp_path / "tasks", "--state", tmp_path / "state"]
    done = run_here(*command, "--log-format", "json", "--log-level", "debug")
    assert done.returncode == 0, done.stderr
    configuration = json.loads(Path(started[0]).read_text())
    assert configuration["loggers"]["vllm"]["level"] == "DEBUG"
    assert "VLLM_LOGGING_CONFIG_PATH" not in os.environ


@pytest.mark.parametrize(
    ("vllm", "variables", "refusal"),
    [
        (["--log-config-file", "mine.json"], {}, "--log-format json and --log-config-file are both given"),
        (["--logging-config.formatter", "json"], {}, "and --logging-config.formatter are both given"),
        ([], {"VLLM_LOGGING_CONFIG_PATH": "mine.json"}, "and VLLM_LOGGING_CONFIG_PATH are both given"),
        ([], {"VLLM_CONFIGURE_LOGGING": "0"}, "cannot be used with VLLM_CONFIGURE_LOGGING=0"),
        (["--disable-access-log-for-endpoints", "/health"], {}, "has no effect on JSON logs"),
    ],
)
def test_another_configuration_is_refused(
    vllm: list[str], variables: dict[str, str], refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match=refusal):
        _json_logs(ServeOptions("base", (), vllm=tuple(vllm)))


def test_the_log_of_a_server_of_classifiers(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    own = ["--port", "0", "--threads", "1", "--log-format", "json", "--api-key-file", str(tmp_path / "keys")]
    code = "from peanut_serve.cli import main; main()"
    command = [sys.executable, "-c", code, "classify", str(stand_in(tmp_path / "mood")), *own]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        for path, key in (("mood", KEY), ("none", f"{KEY}-wrong")):
            headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/models/{path}", b'{"inputs": "a"}', headers)
            with pytest.raises(urllib.error.HTTPError):  # the graph is a stand-in
                urllib.request.urlopen(request, timeout=120)
        process.terminate()
        _, log = process.communicate(timeout=120)
    finally:
        process.kill()
    found = [json.loads(line) for line in log.splitlines()]
    assert "stopping: 0 inputs are waiting" in [one["message"] for one in found]
    assert {"peanut_serve.classify"} <= {one["logger"] for one in found}
    assert KEY not in log


def test_ray_serve_logs_in_the_same_format(tmp_path: Path) -> None:
    settings = ClassifierSettings(folders=(tmp_path,), log_format="json")
    written = yaml.safe_load(yaml.safe_dump(declaration(settings, "127.0.0.1", 8000)))
    assert written["logging_config"] == {"encoding": "JSON"}
    assert written["applications"][0]["args"]["log_format"] == "json"
    assert "logging_config" not in declaration(ClassifierSettings(folders=(tmp_path,)), "127.0.0.1", 8000)
