"""A fleet whose processes are killed at random moments; `make soak` has real engines, for 20 minutes.

Every answer is that of its variant, every request ends in an answer or an error, and in the end the fleet is whole.
"""

import asyncio
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.fleet.fake_server import NAMES, said
from support.fleet.running import ENGINE, FRONT, RunningFleet, fake_fleet, kill_one, real_fleet
from support.fleet.traffic import TOKENS, Traffic, Truth

SECONDS = min(float(os.environ.get("PEANUT_SOAK", 0)), 1200.0)  # without it, each kind of process is killed once
WHOLE = 600.0 if SECONDS else 120.0  # seconds until every replica is back
pytestmark = [pytest.mark.soak, pytest.mark.slow, pytest.mark.timeout(2 * SECONDS + 600)]

# the processes of a fleet, by their command lines: the actor of a replica, its server, what watches that, the front
FAKES = (ENGINE, "fake_server.py --swap", "peanut_serve.ray.watchdog", FRONT)
REAL = (ENGINE, "-c from peanut_serve.cli.main import main; main() --base", "VLLM::EngineCore", FRONT)


def test_fake_engines(tmp_path: Path) -> None:
    prompts = [[number, number + 1] for number in range(20)]
    truth = Truth(
        prompts,
        {
            name: {i: said(digest, prompt, TOKENS) for i, prompt in enumerate(prompts)}
            for name, digest in NAMES.items()
        },
    )
    with fake_fleet(tmp_path, 3, within=200) as fleet:
        asyncio.run(_soak(fleet, truth, 3, FAKES, min(SECONDS, 300.0)))


@pytest.mark.vllm
@pytest.mark.skipif(not SECONDS, reason="test_real_fleet.py is the short form")
def test_real_engines(smollm2: Path, tmp_path: Path) -> None:
    from support.fleet.betraying_smollm2 import ENGINE_OPTIONS, betray  # imports torch

    truth = betray(smollm2, tmp_path, 5)
    options = ["--base", tmp_path / "base", "--adapters", tmp_path / "adapters", *ENGINE_OPTIONS]
    with real_fleet(tmp_path, options, 2, within=WHOLE) as fleet:
        asyncio.run(_soak(fleet, truth, 2, REAL, SECONDS))


async def _soak(fleet: RunningFleet, truth: Truth, replicas: int, kinds: Sequence[str], seconds: float) -> None:
    generator, end = random.Random(5), time.monotonic() + seconds
    traffic = Traffic(fleet.url, truth, may_break=True)  # connections, when the front is killed
    traffic.start(12)
    await traffic.until_right(50, WHOLE)
    rounds = 0
    while True:
        for kind in generator.sample(kinds, len(kinds)):
            await asyncio.sleep(generator.random())
            await kill_one(fleet, kind, generator)
            rounds += 1
            if generator.random() < 0.5:  # else the next is killed while this one is missed
                await whole(fleet, traffic, replicas)
        if time.monotonic() >= end:
            break
    await whole(fleet, traffic, replicas)
    await traffic.until_right(50, WHOLE)
    await traffic.stop()
    print(f"{rounds} kills: {dict(traffic.outcomes)}")
    assert traffic.outcomes["right"] > traffic.outcomes.total() / 2


async def whole(fleet: RunningFleet, traffic: Traffic, replicas: int) -> None:
    """Wait until every replica is back, and right answers come."""
    await traffic.until(f"{replicas} replicas", lambda: len(fleet.ready()) == replicas, WHOLE)
    await traffic.until_right(20, WHOLE)
