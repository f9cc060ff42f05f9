"""`--base-copy device` with the real vLLM: workers keep W0, evaluate variants, restore the base bit for bit."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from support.engines.serving import QUESTIONS, Server, answer, environment, free_port, serving, status_of
from support.paths import ROOT
from support.tiny_models import save_adapter, tiny_llama

from converters import merge

pytestmark = pytest.mark.vllm

ADAPTERS = ROOT / "examples" / "adapters"
BASE = "smollm2-135m-instruct"
RIGHT = {"smollm2-json": '{"answer": "green"}', "smollm2-upper": "GRASS IS GREEN.", "upper-folder": "GRASS IS GREEN."}
PATH = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])


def test_every_shard_is_that_of_the_host(tmp_path: Path) -> None:
    """With two workers, each keeps its half; what it evaluates is what it loads from the host, but for roundings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 1024}
    model = tiny_llama(**sizes).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    script = ROOT / "tests/support/engines/comparing_shards.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "base"), str(tmp_path / "adapter"), "2"],
        env={**environment(tmp_path), "PYTHONPATH": PATH, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    lines = [line.removeprefix("COMPARED ") for line in done.stdout.splitlines() if line.startswith("COMPARED ")]
    assert len(lines) == 1, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(lines[0])
    for count, differ, farthest in found["device"]:
        assert farthest <= 1
        assert differ < 1e-2 * count
    assert [differ for _, differ, _ in found["restored"]] == [0, 0]
    assert all(differ > 1000 for _, differ, _ in found["changed"])
    norms = found["whole"] - sum(found["kept"])  # every worker has those; all else is there once
    assert abs(norms) < 0.01 * found["whole"]
    assert all(abs(kept - found["whole"] / 2) < 0.01 * found["whole"] for kept in found["kept"])
    assert all(needed > found["whole"] / 2 and free > needed for _, needed, free in found["room"])


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two adapters, and a merged folder whose weights come from the host."""
    folder = tmp_path_factory.mktemp("device")
    (folder / "variants").mkdir()
    for name in ("smollm2-json", "smollm2-upper"):
        (folder / "variants" / name).symlink_to(ADAPTERS / name)
    merge(smollm2, ADAPTERS / "smollm2-upper", folder / "variants" / "upper-folder")
    port = str(free_port())
    (folder / "admin-port").write_text(port)
    options = (
        "--mode", "merged", "--base-copy", "device", "--state", str(folder / "state"), "--admin-port", port,
        "--worker-extension-cls", "support.engines.probing_worker.ProbingWorker",
        "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--max-wait", "1",
    )  # fmt: skip
    variables = {"PEANUT_ADMIN_KEY": "secret", "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": PATH}
    variables["PEANUT_TEST_FAULT"] = str(folder / "fault")
    with serving(smollm2, folder / "variants", folder, *options, **variables) as running:
        yield running


def weights_of(server: Server) -> str:
    """Hash of all weights in the engine."""
    body = json.dumps({"method": "probe_weights"}).encode()
    request = urllib.request.Request(f"{server.url}/collective_rpc", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return str(json.loads(response.read())["results"][0])


def engine(server: Server) -> Any:
    port = (server.log.parent / "admin-port").read_text()
    url = f"http://127.0.0.1:{port}/admin/v1/engine"
    request = urllib.request.Request(url, headers={"Authorization": "Bearer secret"})
    with urllib.request.urlopen(request) as response:
        return json.loads(response.read())


def sent(server: Server) -> int:
    """Bytes of the last swap, by the log."""
    lines = [line for line in server.log.read_text().splitlines() if "outcome=done" in line]
    return int(lines[-1].split(" bytes=")[1].split()[0])


def test_swaps_of_all_kinds(server: Server) -> None:
    """Adapters by their factors, a merged folder from the host, the base from its copies; each time the same bits."""
    pristine, weights = weights_of(server), dict[str, str]()
    for name in ("smollm2-json", BASE, "upper-folder", "smollm2-upper", BASE, "smollm2-json", "upper-folder", BASE):
        found = answer(server.client, name, QUESTIONS[1], 16)
        assert (found == RIGHT[name]) if name in RIGHT else (found not in RIGHT.values())
        if name == BASE:
            assert weights_of(server) == pristine
            assert sent(server) == 0
        elif name != "upper-folder":
            assert 0 < sent(server) < 40 << 20
            assert weights.setdefault(name, weights_of(server)) == weights_of(server)
        else:
            assert sent(server) > 40 << 20
    assert engine(server)["base_copy_bytes"] > 50 << 20
    assert "self-test of the copies on the devices passed" in server.log.read_text()


@pytest.mark.parametrize("fault", ["raise", "silent"])
def test_half_a_swap_is_rolled_back(server: Server, fault: str) -> None:
    assert answer(server.client, "smollm2-json", QUESTIONS[1], 16) == RIGHT["smollm2-json"]
    before, file = weights_of(server), server.log.parent / "fault"
    file.write_text(fault)
    with pytest.raises(openai.InternalServerError, match="rolled back"):
        answer(server.client, "smollm2-upper", QUESTIONS[1], 16)
    assert not file.exists()
    assert weights_of(server) == before
    assert answer(server.client, "smollm2-json", QUESTIONS[1], 16) == RIGHT["smollm2-json"]
    time.sleep(2.5)  # until a swap that failed is tried again
    assert answer(server.client, "smollm2-upper", QUESTIONS[1], 16) == RIGHT["smollm2-upper"]


def test_a_new_engine_keeps_w0_again(server: Server) -> None:
    assert answer(server.client, BASE, QUESTIONS[1], 16) not in RIGHT.values()
    pristine, kept = weights_of(server), engine(server)["base_copy_bytes"]
    (server.log.parent / "fault").write_text("die")
    with pytest.raises(openai.InternalServerError):
        answer(server.client, "smollm2-json", QUESTIONS[1], 16)
    deadline = time.monotonic() + 300
    while status_of(server, "ready") != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert engine(server)["restarts"] == 1
    time.sleep(2.5)
    for name in ("smollm2-upper", "smollm2-json"):
        assert answer(server.client, name, QUESTIONS[1], 16) == RIGHT[name]
        assert sent(server) < 40 << 20
    assert answer(server.client, BASE, QUESTIONS[1], 16) not in RIGHT.values()
    assert (weights_of(server), engine(server)["base_copy_bytes"]) == (pristine, kept)
