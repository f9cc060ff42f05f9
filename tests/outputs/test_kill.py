"""A run that is killed leaves no output folder, or a complete one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import Pair, save_adapter, tiny_llama

from converters import merge

KILLS = 200 if "PEANUT_SOAK" in os.environ else 100


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


# Imports are most of a short run and hold nothing to break: one process has done them, and forks for every merge.
FORKING = """
import json, os, sys
from converters.api import merging
from converters.evaluation import verify  # all that a merge imports
print("ready", flush=True)
for line in sys.stdin:
    arguments, options = json.loads(line)
    if (child := os.fork()) == 0:
        try:
            merging.merge(*arguments, **options)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forker:
    """Starts merges, and kills them."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", FORKING]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def kill_at(self, work: Pair, seconds: float, **options: object) -> bool:
        """Start a merge, kill it after a while; whether it had already ended."""
        arguments = [str(work.base), str(work.adapter), str(work.output)]
        self.process.stdin.write(json.dumps([arguments, options]) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = int(self.process.stdout.readline())
        assert status in (0, -signal.SIGKILL)
        return status == 0


@pytest.fixture
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.process.kill()
    forker.process.communicate(timeout=60)


def snapshot(folder: Path) -> dict[str, bytes] | None:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} if folder.exists() else None


def looks_like_a_model(folder: Path) -> bool:
    return (folder / "config.json").exists()


@pytest.mark.kills
@pytest.mark.parametrize("resume", [False, True])
def test_killed_at_random_moments(work: Pair, forker: Forker, resume: bool) -> None:
    """No output, or the whole one, byte for byte; with `resume` every run goes on with what the killed ones left."""
    merge(work.base, work.adapter, work.output)
    whole = snapshot(work.output)
    assert whole is not None
    shutil.rmtree(work.output)
    moments, limit = random.Random(7), 1.0
    seen = {"none": 0, "complete": 0}
    for _ in range(KILLS // 2):
        ended = forker.kill_at(work, moments.uniform(0, limit), resume=resume)
        limit *= 0.8 if ended else 1.25  # about every second run is hit, however fast the machine is
        found = snapshot(work.output)
        assert found in (None, whole)
        seen["none" if found is None else "complete"] += 1
        for path in work.output.parent.iterdir():
            if path.name.startswith("."):  # what was left does not load as a model, unless it is the whole one
                assert path.name == ".merged.peanut-staging"
                assert not looks_like_a_model(path) or snapshot(path) == whole
        if found is not None:
            shutil.rmtree(work.output)
    assert seen["none"] >= KILLS // 20, seen
    assert seen["complete"] >= KILLS // 20, seen
    merge(work.base, work.adapter, work.output, resume=resume)
    assert snapshot(work.output) == whole
    assert sorted(p.name for p in work.output.parent.iterdir()) == ["adapter", "base", "merged"]
    shutil.rmtree(work.output)


@pytest.mark.kills
def test_a_killed_overwrite_leaves_the_old_or_the_new(work: Pair, forker: Forker) -> None:
    merge(work.base, work.adapter, work.output, dtype="bf16")
    old = snapshot(work.output)
    moments = random.Random(8)
    for _ in range(20):
        forker.kill_at(work, moments.uniform(0, 1.0), overwrite=True)
        found = snapshot(work.output)
        assert found is not None
        if found != old:
            assert load_file(work.output / "model.safetensors")["lm_head.weight"].dtype is torch.float32
            assert json.loads((work.output / "config.json").read_text())["dtype"] == "float32"
            merge(work.base, work.adapter, work.output, overwrite=True, dtype="bf16")
    shutil.rmtree(work.output)


@pytest.mark.slow
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
        _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert said.strip() == "peanut-merge: stopped; nothing incomplete was left"
    assert not output.exists()
    assert not staging.exists()
