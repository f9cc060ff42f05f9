"""Adapters of the real SmolLM2 whose answers betray them, and what PEFT's unmerged forward pass says they are."""

import random
import shutil
from pathlib import Path

import torch
from support.fleet.traffic import TOKENS, Truth
from support.tiny_models import save_adapter, unmerged
from transformers import LlamaForCausalLM

MARGIN = 1e-2  # between the best and the second best token: far more than float32 leaves open
PROMPTS, LENGTH = 5, 8
ENGINE_OPTIONS = (
    "--mode", "merged", "--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "16", "--enforce-eager",
    "--served-model-name", "base", "--max-wait", "2",
)  # fmt: skip


def betray(smollm2: Path, folder: Path, adapters: int) -> Truth:
    """Write `base` in float32, as weights that are merged in bfloat16 may say something else, and `adapters/task-N`.

    Returns what each of them answers, the base under the name `base`.
    """
    generator = random.Random(0)
    prompts = [[generator.randrange(1000, 40000) for _ in range(LENGTH)] for _ in range(PROMPTS)]
    base = folder / "base"
    model = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model.save_pretrained(base)
    for file in smollm2.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, base)
    tokens = {"base": _answers(model, prompts)}
    for seed in range(adapters):
        adapter = folder / "adapters" / f"task-{seed}"
        fresh = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        save_adapter(fresh, adapter, seed=seed, r=4, scaling=5.0)
        tokens[adapter.name] = _answers(unmerged(LlamaForCausalLM, base, adapter), prompts)
    for prompt in range(PROMPTS):  # nobody can be taken for another
        said = [tuple(answers[prompt]) for answers in tokens.values() if prompt in answers]
        assert len(set(said)) == len(said)
    return Truth(prompts, tokens)


def _answers(model: torch.nn.Module, prompts: list[list[int]]) -> dict[int, list[int]]:
    """Greedy tokens for the prompts whose every token is the best one by the margin."""
    inputs, cache = torch.tensor(prompts), None
    tokens: list[torch.Tensor] = []
    margins: list[torch.Tensor] = []
    with torch.no_grad():
        for _ in range(TOKENS):
            found = model(inputs, past_key_values=cache, use_cache=True)
            best = found.logits[:, -1].topk(2)
            inputs, cache = best.indices[:, :1], found.past_key_values
            tokens.append(inputs)
            margins.append(best.values[:, 0] - best.values[:, 1])
    sure = (torch.stack(margins).min(0).values > MARGIN).tolist()
    return {i: answer for i, answer in enumerate(torch.cat(tokens, 1).tolist()) if sure[i]}
