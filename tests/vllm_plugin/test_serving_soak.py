"""Many adapters, added, changed and removed during concurrent requests and cancellations; `make soak` is longer."""

import asyncio
import os
import random
from pathlib import Path

import openai
import pytest
from support.engines.betraying import World, ask, make_world, memory, replace
from support.engines.serving import Server, serving

pytestmark = [pytest.mark.vllm, pytest.mark.soak]

SOAK = "PEANUT_SOAK" in os.environ
ADAPTERS, REQUESTS, ROUNDS = (64, 500, 6) if SOAK else (8, 80, 3)


@pytest.fixture(scope="module")
def world(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(smollm2, tmp_path_factory.mktemp("soak"), ADAPTERS)


def test_an_answer_identifies_its_task(world: World) -> None:
    answers = [(i, tuple(tokens)) for known in world.truth.values() for i, tokens in known.items()]
    assert len(set(answers)) == len(answers) > 4 * ADAPTERS


async def one_round(client: openai.AsyncOpenAI, world: World, names: dict[str, set[int]], gone: set[str]) -> int:
    """Send all requests at once, cancel some, and check every answer; returns the number of answers."""
    generator = random.Random(len(names))

    async def check(name: str) -> bool:
        seeds = names[name]
        prompts = [i for i in range(len(world.prompts)) if all(i in world.truth[seed] for seed in seeds)]
        prompt = generator.choice(prompts)
        try:
            tokens = await ask(client, world, name, prompt)
        except openai.NotFoundError:
            assert name in gone, name
            return False
        assert tokens in [world.truth[seed][prompt] for seed in seeds], (name, prompt)
        return True

    wanted = [generator.choice(list(names)) for _ in range(REQUESTS)]
    tasks = [asyncio.create_task(check(name)) for name in wanted]
    await asyncio.sleep(0.2)
    cancelled = generator.sample(range(REQUESTS), REQUESTS // 10)
    for i in cancelled:
        tasks[i].cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    for i, result in enumerate(done):
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
        assert i in cancelled or isinstance(result, bool)
    return sum(result is True for result in done)


def test_every_answer_is_of_its_own_task(world: World, tmp_path: Path) -> None:
    options = ("--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "64", "--served-model-name", "base")
    with serving(world.base, world.roots, tmp_path, *options) as server:
        sizes = asyncio.run(all_rounds(server, world))
    assert sizes[-1] <= sizes[1] * 1.1, [size >> 20 for size in sizes]


async def all_rounds(server: Server, world: World) -> list[int]:
    client, generator, sizes = server.async_client, random.Random(1), []
    current = {f"task-{seed}": seed for seed in range(ADAPTERS)}
    for number in range(ROUNDS):
        names = {"base": {-1}, **{name: {seed} for name, seed in current.items()}}
        assert await one_round(client, world, names, set()) >= REQUESTS * 8 // 10
        # now change, remove and add some while requests for them are running
        changing = generator.sample(sorted(current), len(current) // 4)
        leaving = generator.sample(sorted(set(current) - set(changing)), 1)
        names |= {name: {current[name], (current[name] + ADAPTERS) % (2 * ADAPTERS)} for name in changing}
        running = asyncio.create_task(one_round(client, world, names, set(leaving)))
        for name in changing:
            current[name] = (current[name] + ADAPTERS) % (2 * ADAPTERS)
            await asyncio.to_thread(replace, world, name, current[name])
        for name in leaving:
            (world.roots / name).unlink()
        await running
        for name in leaving:
            seed = current.pop(name)
            current[f"new-{number}-{seed}"] = seed
            await asyncio.to_thread(replace, world, f"new-{number}-{seed}", seed)
        sizes.append(memory(server))
    names = {"base": {-1}, **{name: {seed} for name, seed in current.items()}}
    await one_round(client, world, names, set())
    return [*sizes, memory(server)]
