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
BASE, HOT = "base", "task-0"
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def world(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(smollm2, tmp_path_factory.mktemp("adaptive"), VARIANTS)


@pytest.fixture
def server(world: World, tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "admin-port").write_text(port := str(free_port()))
    options = (
        "--mode", "auto", "--resident", HOT, "--gather", "500", "--settle", "0", "--admin-port", port,
        "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8", "--served-model-name", BASE,
        "--enforce-eager",
    )  # fmt: skip
    with serving(world.base, world.roots, tmp_path, *options, PEANUT_ADMIN_KEY="secret") as running:
        yield running


class Traffic:
    """Clients that often ask for the resident.

    Attributes:
        versions: name -> seeds of the versions that it may answer with now.
        paths: (name, how it was answered) -> how often.
        errors: how often the engine was lost under a request.
    """

    def __init__(self, server: Server, world: World) -> None:
        self.server, self.world, self.client = server, world, server.async_client
        self.versions = {BASE: {-1}, **{f"task-{seed}": {seed} for seed in range(VARIANTS)}}
        self.paths, self.errors = Counter[tuple[str, str]](), 0
        known = (set(world.truth[seed]) for seed in range(-1, 2 * VARIANTS))
        self.prompts = sorted(set.intersection(*known))
        self.clients: list[asyncio.Task[None]] = []

    async def ask_for_ever(self, number: int) -> None:
        dice = random.Random(number)
        while True:
            name = HOT if dice.random() < 0.4 else dice.choice(sorted(self.versions))
            await self.ask(name, dice.choice(self.prompts))

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

    async def until_shared(self) -> str:
        """Wait until all were answered with the weights of one resident; the digest of these weights."""
        await self.until("a resident", lambda: self.engine()["resident"] == HOT)
        before, wanted = Counter(self.paths), [(HOT, "merged"), (BASE, "complement")]
        wanted += [(name, "complement") for name in self.versions if name not in (HOT, BASE)]
        await self.until("answers of all", lambda: all(self.paths[one] > before[one] for one in wanted))
        return str(self.engine()["digest"])

    def engine(self) -> dict[str, object]:
        port = (self.server.log.parent / "admin-port").read_text()
        headers = {"Authorization": "Bearer secret"}
        answer = httpx.get(f"http://127.0.0.1:{port}/admin/v1/engine", headers=headers, timeout=60)
        return dict(answer.json())


async def everything(server: Server, world: World) -> Traffic:
    traffic = Traffic(server, world)
    traffic.clients = [asyncio.create_task(traffic.ask_for_ever(number)) for number in range(CLIENTS)]
    weights = [await traffic.until_shared()]
    for new in (VARIANTS + 1, VARIANTS + 2):  # other θ of the resident: complements belong to the θ before
        old = traffic.versions[HOT]
        traffic.versions[HOT] = {*old, new}
        await asyncio.to_thread(replace, world, HOT, new)
        await traffic.until("another resident", lambda: traffic.engine()["digest"] not in weights)
        await traffic.until_shared()
        traffic.versions[HOT] = {new}
        weights.append(await traffic.until_shared())
    before = sum(traffic.paths.values())
    kill(server, "VLLM::EngineCore")
    await traffic.until("answers after a restart", lambda: sum(traffic.paths.values()) > before + 20)
    assert await traffic.until_shared() == weights[-1]
    assert len(set(weights)) == 3
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
