"""Adaptive merging in the real vLLM, with adapters whose answers betray them (`support/engines/betraying.py`).

In float32, every answer has to be that of its own variant, token for token, whoever the resident is, before, while
and after it changes, and after the engine was killed.
"""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from support.engines.betraying import TOKENS, World, make_world, replace
from support.engines.serving import Server, free_port, kill, serving

VARIANTS, CLIENTS = 4, 8
WAIT = 600.0  # for anything that has to happen: a start of an engine takes minutes on a starved machine
BASE = "base"
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def world(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(smollm2, tmp_path_factory.mktemp("adaptive"), VARIANTS)


@pytest.fixture
def server(world: World, tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "admin-port").write_text(port := str(free_port()))
    options = (
        "--mode", "auto", "--resident", "auto", "--gather", "500", "--settle", "0", "--admin-port", port,
        "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8", "--served-model-name", BASE,
        "--enforce-eager",
    )  # fmt: skip
    with serving(world.base, world.roots, tmp_path, *options, PEANUT_ADMIN_KEY="secret") as running:
        yield running


class Traffic:
    """Clients that mostly ask for one variant.

    Attributes:
        hot: which.
        versions: name -> seeds of the versions that it may answer with now.
        paths: (name, how it was answered) -> how often.
        errors: how often the engine was lost under a request.
    """

    def __init__(self, server: Server, world: World) -> None:
        self.server, self.world, self.client = server, world, server.async_client
        self.hot, self.share = "task-0", 0.95
        self.versions = {BASE: {-1}, **{f"task-{seed}": {seed} for seed in range(VARIANTS)}}
        self.paths, self.errors = Counter[tuple[str, str]](), 0
        known = (set(world.truth[seed]) for seed in range(-1, 2 * VARIANTS))
        self.prompts = sorted(set.intersection(*known))
        self.clients: list[asyncio.Task[None]] = []

    async def ask_for_ever(self, number: int) -> None:
        dice = random.Random(number)
        while True:
            is_hot = dice.random() < self.share
            await self.ask(self.hot if is_hot else dice.choice(sorted(self.versions)), dice.choice(self.prompts))

    async def ask(self, name: str, prompt: int) -> None:
        allowed = set(self.versions[name])
        try:
            raw = await self.client.completions.with_raw_response.create(
                model=name, prompt=self.world.prompts[prompt], temperature=0, max_tokens=TOKENS,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )  # fmt: skip
        except openai.APIStatusError as error:
            assert error.status_code >= 500, error
            self.errors += 1
            return
        allowed |= self.versions[name]
        path, found = raw.headers["x-peanut-path"], list(raw.parse().choices[0].model_extra["token_ids"])
        assert found in [self.world.truth[seed][prompt] for seed in allowed], (name, path, prompt, found)
        self.paths[name, path] += 1

    async def until(self, what: str, is_so: Callable[[], bool]) -> None:
        """Wait until something is so; a wrong answer, and a wait that takes too long, end the test."""
        deadline = time.monotonic() + WAIT
        while not is_so():
            await asyncio.sleep(0.2)
            for client in self.clients:
                if client.done():
                    client.result()  # raises its error
            assert time.monotonic() < deadline, f"not within {WAIT:.0f} s: {what} ({dict(self.paths)})"

    async def until_all(self, path: str) -> None:
        """Wait until every variant was answered again, the resident merged and others by this path."""
        before = Counter(self.paths)
        names = [name for name in self.versions if name != self.hot]
        await self.until(path, lambda: all(self.paths[name, path] > before[name, path] for name in names))
        assert self.paths[self.hot, "merged"] > before[self.hot, "merged"]

    def resident(self) -> str | None:
        port = (self.server.log.parent / "admin-port").read_text()
        headers = {"Authorization": "Bearer secret"}
        found = httpx.get(f"http://127.0.0.1:{port}/admin/v1/engine", headers=headers, timeout=60).json()
        return str(found["resident"]) if found["resident"] else None

    async def until_resident(self, name: str) -> None:
        await self.until(f"{name} as the resident", lambda: self.resident() == name)


async def everything(server: Server, world: World) -> Traffic:
    traffic = Traffic(server, world)
    traffic.clients = [asyncio.create_task(traffic.ask_for_ever(number)) for number in range(CLIENTS)]
    for hot in ("task-0", "task-1"):
        traffic.hot, traffic.share = hot, 0.98
        await traffic.until_resident(hot)
        traffic.share = 0.4
        await traffic.until_all("complement")
    traffic.share = 0.98
    new = VARIANTS + 2  # another version of the resident: its complements belong to the one before
    traffic.versions["task-1"] = {1, new}
    old = sum(traffic.paths.values())
    await asyncio.to_thread(replace, world, "task-1", new)
    await traffic.until("requests of before to end", lambda: sum(traffic.paths.values()) > old + 60)
    traffic.versions["task-1"] = {new}
    traffic.share = 0.4
    await traffic.until_all("complement")
    before = sum(traffic.paths.values())
    kill(server, "VLLM::EngineCore")
    await traffic.until("answers after a restart", lambda: sum(traffic.paths.values()) > before + 60)
    traffic.hot, traffic.share = "task-2", 0.98
    await traffic.until_resident("task-2")
    traffic.share = 0.4
    await traffic.until_all("complement")
    for client in traffic.clients:
        client.cancel()
    await asyncio.wait(traffic.clients)
    return traffic


def test_every_answer_is_of_its_own_variant(server: Server, world: World) -> None:
    traffic = asyncio.run(everything(server, world))
    print(dict(traffic.paths), traffic.errors)
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    by_path = {path: float(n) for path, n in re.findall(r'peanut_path_requests_total{path="(.*)"} (.*)', text)}
    assert by_path["complement"] >= sum(n for (_, path), n in traffic.paths.items() if path == "complement") > 0
    assert traffic.errors <= 2 * CLIENTS  # those that ran when the engine was killed
    assert "belongs to" not in server.log.read_text()  # no worker had to refuse a complement
