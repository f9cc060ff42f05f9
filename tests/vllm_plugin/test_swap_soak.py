"""Eight variants in one engine, many clients, and every fault; `make soak` runs it for half an hour.

Every answer identifies its variant (see `betraying.py`). No request is lost: each gets an answer or an error.
"""

import asyncio
import os
import random
import re
import shutil
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
from support.engines.betraying import World, ask, make_world, memory, replace, switch
from support.engines.probing_worker import FAULT
from support.engines.serving import PROGRAM, Server, kill, serving
from support.paths import ROOT

SECONDS = float(os.environ.get("PEANUT_SOAK", 0))  # the short version injects every fault once
CLIENTS, VARIANTS = 24, 8
WAIT = 900.0  # for anything that has to happen: a start of an engine takes minutes on a starved machine
# a round takes minutes under load, and the last one begins just before the time is over
pytestmark = [pytest.mark.vllm, pytest.mark.soak, pytest.mark.timeout(2 * SECONDS + 1200)]
BASE = "base"


@pytest.fixture(scope="module")
def world(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(smollm2, tmp_path_factory.mktemp("swap-soak"), VARIANTS)


class Traffic:
    """Clients that send requests continuously, and their results."""

    def __init__(self, server: Server, world: World) -> None:
        self.world, self.client = world, server.async_client
        # name -> versions it may answer with now, and kinds of errors it may give
        self.versions = {BASE: {-1}, **{f"task-{seed}": {seed} for seed in range(VARIANTS)}}
        self.refusals: dict[str, type[openai.APIStatusError]] = {}
        self.outcomes: Counter[str] = Counter()
        self.clients: list[asyncio.Task[None]] = []
        self.is_over = False

    async def ask_for_ever(self, number: int) -> None:
        generator = random.Random(number)
        while not self.is_over:
            name = generator.choice(sorted(self.versions))
            asking = asyncio.create_task(self.ask_once(name, generator))
            try:
                if generator.random() < 0.1:
                    await asyncio.sleep(generator.random() * 0.3)
                    asking.cancel()
                await asyncio.wait([asking])  # unlike `await asking`, raises only if this client is cancelled
            finally:
                asking.cancel()
            if asking.cancelled():
                self.outcomes["cancelled"] += 1
            else:
                asking.result()

    async def ask_once(self, name: str, generator: random.Random) -> None:
        allowed = set(self.versions[name])
        known = set.intersection(*(set(self.world.truth[seed]) for seed in range(-1, 2 * VARIANTS)))
        prompt = generator.choice(sorted(known))
        refusal = self.refusals.get(name)
        try:
            tokens = await ask(self.client, self.world, name, prompt)
        except openai.APIStatusError as error:
            refusal = refusal or self.refusals.get(name)
            is_server_error = error.status_code in (500, 503)  # a failed swap, an engine that died
            assert is_server_error or (refusal is not None and isinstance(error, refusal)), (name, error)
            self.outcomes[str(error.status_code)] += 1
            return
        allowed |= self.versions[name]
        assert tokens in [self.world.truth[seed][prompt] for seed in allowed], (name, prompt, tokens)
        self.outcomes["right"] += 1

    async def until(self, what: str, is_so: Callable[[], bool]) -> None:
        """Wait until something is so; what a client has found wrong, and a wait that takes too long, end the test."""
        deadline = time.monotonic() + WAIT
        while not is_so():
            await asyncio.sleep(0.05)
            for client in self.clients:
                if client.done():
                    client.result()  # raises its error
            assert time.monotonic() < deadline, f"not within {WAIT:.0f} s: {what} ({dict(self.outcomes)})"

    async def until_right(self, count: int) -> None:
        """Wait for `count` more correct answers."""
        wanted = self.outcomes["right"] + count
        await self.until(f"{count} right answers", lambda: self.outcomes["right"] >= wanted)

    async def until_asked(self, name: str, ends: Callable[[openai.APIStatusError | None], bool]) -> None:
        """Ask a variant until `ends` is true of the error, or of None for an answer."""
        deadline = time.monotonic() + WAIT
        while True:
            error: openai.APIStatusError | None = None
            try:
                await ask(self.client, self.world, name, 0)
            except openai.APIStatusError as caught:
                error = caught
            if ends(error):
                return
            assert time.monotonic() < deadline, f"{name} still answers with {error!r}"
            await asyncio.sleep(0.1)


class Faults:
    """The faults. Each method returns when its fault is over."""

    def __init__(self, server: Server, traffic: Traffic, folder: Path) -> None:
        self.server, self.traffic, self.folder = server, traffic, folder
        self.fault = folder / "fault"

    async def failing_swap(self, kind: str) -> None:
        """The next swap raises in the middle, applies half of the weights, or kills the worker."""
        self.fault.write_text(kind)
        await self.traffic.until(f"a swap with the fault {kind}", lambda: not self.fault.exists())

    async def killed(self, process: str) -> None:
        """SIGKILL the worker, or the engine."""
        before = self.restarts()
        kill(self.server, process)
        await self.until_restarted(before)

    async def until_restarted(self, before: float) -> None:
        await self.traffic.until("a restart of the engine", lambda: self.restarts() > before)

    def restarts(self) -> float:
        return metric(self.server, "peanut_engine_restarts_total")

    async def broken_theta(self, seed: int) -> None:
        """θ is truncated, then restored."""
        name, broken = f"task-{seed}", self.folder / f"broken-{seed}"
        shutil.copytree(self.traffic.world.versions[seed], broken, dirs_exist_ok=True)
        weights = broken / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:2000])
        await self.exchanged(name, broken, openai.UnprocessableEntityError)

    async def missing_files(self, seed: int) -> None:
        """The variant is removed, and added again."""
        await self.exchanged(f"task-{seed}", None, openai.NotFoundError)

    async def exchanged(self, name: str, other: Path | None, refusal: type[openai.APIStatusError]) -> None:
        whole = (self.traffic.world.roots / name).readlink()
        self.traffic.refusals[name] = refusal
        switch(self.traffic.world, name, other)
        await self.traffic.until_asked(name, lambda error: isinstance(error, refusal))
        switch(self.traffic.world, name, whole)
        await self.traffic.until_asked(name, lambda error: error is None)
        await self.traffic.until_right(20)
        del self.traffic.refusals[name]

    async def new_version(self, seed: int) -> None:
        """The name now refers to another version."""
        name = f"task-{seed}"
        new = (max(self.traffic.versions[name]) + VARIANTS) % (2 * VARIANTS)
        old, self.traffic.versions[name] = self.traffic.versions[name], {*self.traffic.versions[name], new}
        await asyncio.to_thread(replace, self.traffic.world, name, new)
        await self.traffic.until_asked(name, lambda error: error is None)
        await self.traffic.until_right(40)  # requests from before are done
        self.traffic.versions[name] -= old

    async def full_disk(self, seed: int) -> None:
        """No new version can be stored while the disk of the server's state is full; existing ones are served."""
        name = f"task-{seed}"
        filler = Path(f"/proc/{self.server.process.pid}/root{self.folder}/state/filler")
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        new = (max(self.traffic.versions[name]) + VARIANTS) % (2 * VARIANTS)
        await self.exchanged(name, self.traffic.world.versions[new], openai.UnprocessableEntityError)
        filler.unlink()


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        found = re.findall(rf"^{name}(?:{{.*}})? (.*)$", response.read().decode(), re.MULTILINE)
    return sum(map(float, found))


@contextmanager
def swapping(world: World, folder: Path) -> Iterator[Server]:
    """A server whose state is on its own small disk."""
    (folder / "state").mkdir()
    mount = f'mount -t tmpfs -o size=4m tmpfs {folder}/state && exec {PROGRAM} "$@"'
    program = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    options = (
        "--mode", "merged", "--state", str(folder / "state"), "--max-wait", "2", "--dtype", "float32",
        "--max-model-len", "128", "--max-num-seqs", "16", "--served-model-name", BASE, "--enforce-eager",
        "--worker-extension-cls", "support.engines.probing_worker.ProbingWorker",
    )  # fmt: skip
    variables = {"PYTHONPATH": str(ROOT / "tests"), FAULT: str(folder / "fault")}
    with serving(world.base, world.roots, folder, *options, program=program, **variables) as server:
        yield server


async def everything(server: Server, world: World, folder: Path) -> Traffic:
    traffic = Traffic(server, world)
    faults = Faults(server, traffic, folder)
    traffic.clients = [asyncio.create_task(traffic.ask_for_ever(number)) for number in range(CLIENTS)]
    generator, start, sizes = random.Random(7), time.monotonic(), []

    async def one_round() -> None:
        some: list[Callable[[], object]] = [
            lambda: faults.failing_swap("raise"),
            lambda: faults.broken_theta(generator.randrange(VARIANTS)),
            lambda: faults.failing_swap("silent"),
            lambda: faults.missing_files(generator.randrange(VARIANTS)),
            lambda: faults.new_version(generator.randrange(VARIANTS)),
            lambda: faults.full_disk(generator.randrange(VARIANTS)),
            lambda: faults.killed(generator.choice(["VLLM::Worker", "VLLM::EngineCore"])),
        ]
        for fault in some:
            await traffic.until_right(60)
            await fault()  # type: ignore[misc]

    await traffic.until_right(200)  # every canary has been recorded by now
    while True:
        await one_round()
        sizes.append(memory(server))
        if time.monotonic() - start >= SECONDS:
            break
    if SECONDS:
        before = faults.restarts()
        await faults.failing_swap("exit")
        await faults.until_restarted(before)
    await traffic.until_right(100)
    traffic.is_over = True
    await asyncio.wait_for(asyncio.gather(*traffic.clients), WAIT)
    print(f"{dict(traffic.outcomes)}, memory in MiB {[size >> 20 for size in sizes]}")
    if len(sizes) > 4:
        assert sizes[-1] <= max(sizes[:3]) * 1.15
    return traffic


def test_every_answer_is_of_its_own_variant(world: World, tmp_path: Path) -> None:
    with swapping(world, tmp_path) as server:
        traffic = asyncio.run(everything(server, world, tmp_path))
        with urllib.request.urlopen(f"{server.url}/ready", timeout=60) as response:
            assert response.status == 200
        rolled_back = metric(server, "peanut_rollbacks_total")
        restarts = metric(server, "peanut_engine_restarts_total")
    assert rolled_back >= 2
    assert restarts >= 1
    assert traffic.outcomes["right"] > 5 * traffic.outcomes["500"]


@pytest.mark.timeout(60)
def test_what_a_client_finds_ends_the_soak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled clients end, although they cancel requests of their own."""
    wrong = iter([AssertionError("a wrong answer")])

    async def find(self: Traffic, name: str, generator: random.Random) -> None:
        await asyncio.sleep(0.01)
        if generator.random() < 0.05 and (error := next(wrong, None)):
            raise error

    async def soak() -> None:
        traffic = Traffic(SimpleNamespace(async_client=None), SimpleNamespace())  # type: ignore[arg-type]
        traffic.clients = [asyncio.create_task(traffic.ask_for_ever(number)) for number in range(CLIENTS)]
        await traffic.until("nothing", lambda: False)

    monkeypatch.setattr(Traffic, "ask_once", find)
    with pytest.raises(AssertionError, match="a wrong answer"):
        asyncio.run(soak())
