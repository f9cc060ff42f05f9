"""Two real engines of vLLM behind one address, many clients, and a replica that is killed: no answer is wrong.

Every answer betrays whose weights computed it, and every request ends in an answer or in an error.
"""

import asyncio
import random
import time
from pathlib import Path

import pytest
from support.fleet.betraying_smollm2 import ENGINE_OPTIONS, betray
from support.fleet.running import ENGINE, RunningFleet, kill_one, real_fleet
from support.fleet.traffic import Traffic, Truth

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(4000)]

ADAPTERS, CLIENTS, REPLICAS = 3, 12, 2
WAIT = 900.0  # seconds for anything that has to happen: on a starved machine, engines take minutes to start


def test_a_replica_killed_under_load(smollm2: Path, tmp_path: Path) -> None:
    truth = betray(smollm2, tmp_path, ADAPTERS)
    options = ["--base", tmp_path / "base", "--adapters", tmp_path / "adapters", *ENGINE_OPTIONS]
    with real_fleet(tmp_path, options, REPLICAS, WAIT) as fleet:
        outcomes = asyncio.run(_under_load(fleet, truth))
    assert outcomes["right"] > 10 * (outcomes.total() - outcomes["right"]), outcomes


async def _under_load(fleet: RunningFleet, truth: Truth) -> dict[str, int]:
    traffic = Traffic(fleet.url, truth)
    traffic.start(CLIENTS)
    before = await asyncio.to_thread(fleet.ready)
    assert len(before) == REPLICAS
    await traffic.until_right(100, WAIT)
    await kill_one(fleet, ENGINE, random.Random(0))
    await traffic.until_right(40, WAIT)  # from the other one
    whole = time.monotonic()
    await traffic.until("two replicas", lambda: len(fleet.ready()) == REPLICAS, WAIT)
    print(f"whole again after {time.monotonic() - whole:.0f} s: {dict(traffic.outcomes)}")
    assert len(await asyncio.to_thread(fleet.ready) - before) == 1
    await traffic.until_right(60, WAIT)
    await traffic.stop()
    return traffic.outcomes
