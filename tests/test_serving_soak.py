"""Many adapters, many requests at once, cancellations, adapters that come, change and go; `make soak` is longer.

The adapters have large random θ, so that each answers every prompt in words of its own: an answer betrays its task.
PEFT's unmerged forward pass says which words.
"""

import asyncio
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch
from conftest import save_adapter, tiny_llama, unmerged
from serving import Server, serving
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.vllm

SOAK = "PEANUT_SOAK" in os.environ
ADAPTERS, REQUESTS, ROUNDS = (64, 500, 6) if SOAK else (8, 80, 3)
TOKENS = 6
MARGIN = 1e-2  # between the best and the second best token: far more than float32 leaves open
MODEL = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 49152, "num_attention_heads": 2}


@dataclass(frozen=True)
class World:
    """Everything on disk, and the truth."""

    base: Path
    roots: Path
    versions: dict[int, Path]  # seed -> adapter
    truth: dict[int, dict[int, list[int]]]  # seed -> prompt -> tokens
    prompts: list[list[int]]


def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], float]:
    """Greedy tokens, and the least margin by which one was the best."""
    tokens, margin = list(prompt), float("inf")
    for _ in range(TOKENS):
        with torch.no_grad():
            best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], margin


@pytest.fixture(scope="module")
def world(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("soak")
    torch.manual_seed(0)
    model = tiny_llama(**MODEL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(10.0)  # far from saying the last token again
    model.save_pretrained(folder / "base")
    for file in smollm2.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, folder / "base")
    generator = random.Random(0)
    prompts = [[generator.randrange(1000, 40000) for _ in range(generator.randrange(4, 90))] for _ in range(12)]
    versions, truth = {}, {}
    for seed in range(2 * ADAPTERS):
        versions[seed] = folder / "versions" / str(seed)
        fresh = LlamaForCausalLM.from_pretrained(folder / "base")
        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        save_adapter(fresh, versions[seed], seed=seed, r=8 if seed % 2 else 4, scaling=10.0, target_modules=targets)
        adapted = unmerged(LlamaForCausalLM, folder / "base", versions[seed])
        found = {i: greedy(adapted, prompt) for i, prompt in enumerate(prompts)}
        truth[seed] = {i: tokens for i, (tokens, margin) in found.items() if margin > MARGIN}
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    found = {i: greedy(base, prompt) for i, prompt in enumerate(prompts)}
    truth[-1] = {i: tokens for i, (tokens, margin) in found.items() if margin > MARGIN}
    roots = folder / "roots"
    roots.mkdir()
    for seed in range(ADAPTERS):
        (roots / f"task-{seed}").symlink_to(versions[seed])
    return World(folder / "base", roots, versions, truth, prompts)


def test_an_answer_betrays_its_task(world: World) -> None:
    answers = [(i, tuple(tokens)) for known in world.truth.values() for i, tokens in known.items()]
    assert len(set(answers)) == len(answers) > 4 * ADAPTERS


def replace(world: World, name: str, seed: int) -> None:
    """In one step, as a deployment does it."""
    new = world.roots / f".new-{name}"
    new.symlink_to(world.versions[seed])
    new.rename(world.roots / name)


async def ask(client: openai.AsyncOpenAI, world: World, model: str, prompt: int) -> list[int]:
    found = await client.completions.create(
        model=model,
        prompt=world.prompts[prompt],
        temperature=0,
        max_tokens=TOKENS,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return list(found.choices[0].model_extra["token_ids"])


async def one_round(client: openai.AsyncOpenAI, world: World, names: dict[str, set[int]], gone: set[str]) -> int:
    """All requests at once, some of them cancelled; every answer is one of its task's. Returns how many answered."""
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


def memory(server: Server) -> int:
    """Resident bytes of the server and its engine."""
    pids, total = [server.process.pid], 0
    while pids:
        pid = pids.pop()
        pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += next((int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS")), 0)
    return total


def test_no_answer_is_another_task_s(world: World, tmp_path: Path) -> None:
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
        # now some change, some go, some come while requests for them are under way
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
