"""`--log-format json` of a real server: each line that it and its engine log is a JSON object without a key."""

import json
import re
from pathlib import Path

import pytest
from support.engines.serving import answer, serving
from support.paths import ROOT

pytestmark = pytest.mark.vllm

# a line as uvicorn or vLLM writes it by default
LOGGED = re.compile(r"(?:\(.*\) )?(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
KEYS = {"PEANUT_ADMIN_KEY": "an-admin-key-that-nobody-may-read"}


def test_the_log_of_a_server_and_its_engine(smollm2: Path, tmp_path: Path) -> None:
    tasks = ROOT / "examples" / "adapters"
    options = ("--dtype", "float32", "--max-model-len", "256", "--mode", "merged", "--log-format", "json")
    with serving(smollm2, tasks, tmp_path, *options, **KEYS) as server:
        answer(server.client, "smollm2-json", "What color is grass?", 4)
    text = server.log.read_text()
    found, others = [], []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            others.append(line)
    assert {one["process"] for one in found} >= {"APIServer", "EngineCore"}
    assert {one["logger"].partition(".")[0] for one in found} >= {"vllm", "uvicorn"}
    (swap,) = [one for one in found if one["message"].startswith("swap variant=smollm2-json")]
    assert (swap["variant"], len(swap["digest"]), swap["logger"]) == ("smollm2-json", 12, "vllm.peanut_serve")
    # what libraries print themselves is not logged
    assert [line for line in others if LOGGED.match(line)] == []
    assert not any(key in text for key in KEYS.values())
