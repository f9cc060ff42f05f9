"""Adapters whose answers betray them: large random θ, so that each says other words to every prompt.

PEFT's unmerged forward pass says which words.
"""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import openai
import torch
from support.engines.process_tree import descendants_of, resident
from support.engines.serving import Server
from support.tiny_models import save_adapter, tiny_llama, unmerged
from transformers import LlamaForCausalLM

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


def make_world(smollm2: Path, folder: Path, adapters: int) -> World:
    """A base, twice as many versions as `adapters`, the first half of them under names `task-N`."""
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
    for seed in range(2 * adapters):
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
    for seed in range(adapters):
        (roots / f"task-{seed}").symlink_to(versions[seed])
    return World(folder / "base", roots, versions, truth, prompts)


def replace(world: World, name: str, seed: int) -> None:
    """Let a name refer to another version."""
    switch(world, name, world.versions[seed])


def switch(world: World, name: str, to: Path | None) -> None:
    """Let a name refer to another folder, in one step, as a deployment does it; None removes it."""
    if to is None:
        (world.roots / name).unlink()
        return
    new = world.roots / f".new-{name}"
    new.symlink_to(to)
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


def memory(server: Server) -> int:
    """Resident bytes of the server and its engine."""
    return sum(map(resident, descendants_of(server.process.pid)))
