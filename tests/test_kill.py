"""A run that is killed leaves no output folder, or a complete one."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Pair, save_adapter, tiny_llama
from safetensors.torch import load_file

from converters import merge

KILLS = 32


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A merge of about 130 MB, long enough to be hit in every phase."""
    folder = tmp_path_factory.mktemp("kill")
    pair = Pair(folder / "base", folder / "adapter", folder / "merged")
    torch.manual_seed(0)
    model = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8)
    model.save_pretrained(pair.base)
    save_adapter(model, pair.adapter, r=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    return pair


# Imports are most of a short run and hold nothing to break: the merge starts when the parent says so.
CHILD = """
import sys
from converters import merging
print("ready", flush=True)
sys.stdin.readline()
merging.merge(*sys.argv[1:4], overwrite=True)
"""


def kill_at(work: Pair, seconds: float, how: signal.Signals) -> bool:
    """Start a merge, kill it after a while; whether it had already ended."""
    command = [sys.executable, "-c", CHILD, work.base, work.adapter, work.output]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        child.stdin.write("go\n")
        child.stdin.flush()
        time.sleep(seconds)
        ended = child.poll() is not None
        child.send_signal(how)
    return ended


def snapshot(folder: Path) -> dict[str, bytes] | None:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None


def looks_like_a_model(folder: Path) -> bool:
    return (folder / "config.json").exists()


def test_killed_at_random_moments(work: Pair) -> None:
    start = time.perf_counter()
    merge(work.base, work.adapter, work.output)
    duration = time.perf_counter() - start
    whole = snapshot(work.output)
    assert whole is not None
    for path in work.output.iterdir():
        path.unlink()
    work.output.rmdir()
    moments, limit = random.Random(7), duration
    seen = {"none": 0, "complete": 0}
    for _ in range(KILLS):
        ended = kill_at(work, moments.uniform(0, limit), signal.SIGKILL)
        limit *= 0.8 if ended else 1.25  # about every second run is hit, however fast the machine is
        found = snapshot(work.output)
        assert found in (None, whole)  # byte for byte
        seen["none" if found is None else "complete"] += 1
        for path in work.output.parent.iterdir():
            if path.name.startswith("."):  # what was left does not load as a model, unless it is the whole one
                assert path.name == ".merged.peanut-staging"
                assert not looks_like_a_model(path) or snapshot(path) == whole
        if found is not None:
            for path in work.output.iterdir():
                path.unlink()
            work.output.rmdir()
    assert seen["none"] >= 3, seen
    assert seen["complete"] >= 1, seen
    merge(work.base, work.adapter, work.output)  # what killed runs left is cleaned up
    assert snapshot(work.output) == whole
    assert sorted(p.name for p in work.output.parent.iterdir()) == ["adapter", "base", "merged"]


def test_a_killed_overwrite_leaves_the_old_or_the_new(work: Pair) -> None:
    merge(work.base, work.adapter, work.output, overwrite=True, dtype="bf16")
    old = snapshot(work.output)
    moments = random.Random(8)
    for _ in range(8):
        kill_at(work, moments.uniform(0, 1.0), signal.SIGKILL)
        found = snapshot(work.output)
        assert found is not None
        if found != old:
            assert load_file(work.output / "model.safetensors")["lm_head.weight"].dtype is torch.float32
            assert json.loads((work.output / "config.json").read_text())["dtype"] == "float32"
            merge(work.base, work.adapter, work.output, overwrite=True, dtype="bf16")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_cleans_up_and_says_so(work: Pair, number: signal.Signals) -> None:
    output = work.output.with_name("terminated")
    program = Path(sys.executable).parent / "peanut-merge"
    command = [program, "--base", work.base, "--adapter", work.adapter, "-o", output]
    staging = output.with_name(".terminated.peanut-staging")
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
        while not staging.exists() and child.poll() is None:
            time.sleep(0.001)
        child.send_signal(number)
        _, said = child.communicate()
    assert child.returncode == 128 + number
    assert said.strip() == "peanut-merge: stopped; nothing half-written was left"
    assert not output.exists()
    assert not staging.exists()
