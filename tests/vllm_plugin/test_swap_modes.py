"""Other swap modes with the real vLLM: LoRA where possible, salted prefixes, models that cannot be swapped."""

import asyncio
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from support.engines.serving import PROGRAM, QUESTIONS, Server, answer, environment, free_port, serving
from support.paths import ROOT
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from converters import merge

pytestmark = pytest.mark.vllm

ADAPTERS = ROOT / "examples" / "adapters"
BASE = "smollm2-135m-instruct"
RIGHT = {"smollm2-json": '{"answer": "green"}', "upper-folder": "GRASS IS GREEN."}


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An adapter, which can be expressed as LoRA, and a merged folder, which cannot."""
    folder = tmp_path_factory.mktemp("auto")
    shutil.copytree(ADAPTERS / "smollm2-json", folder / "variants" / "smollm2-json")
    merge(smollm2, ADAPTERS / "smollm2-upper", folder / "variants" / "upper-folder")
    options = (
        "--mode", "auto", "--prefix-cache", "salted", "--state", str(folder / "state"), "--api-key", "none",
        "--enable-prompt-tokens-details", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
    )  # fmt: skip
    with serving(smollm2, folder / "variants", folder, *options) as running:
        yield running


def swaps(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        text = response.read().decode()
    return {name: float(n) for name, n in re.findall(r'peanut_swaps_total{outcome="done",variant="(.*)"} (.*)', text)}


def test_lora_where_possible(server: Server) -> None:
    """Both are answered at the same time, without a swap for the adapter."""

    async def ask(variant: str) -> tuple[str, str]:
        found = await server.async_client.chat.completions.create(
            model=variant, messages=[{"role": "user", "content": QUESTIONS[1]}], temperature=0, max_tokens=16
        )
        return variant, str(found.choices[0].message.content)

    async def ask_all() -> list[tuple[str, str]]:
        return await asyncio.gather(*(ask(variant) for variant in list(RIGHT) * 6))

    for variant, text in asyncio.run(ask_all()):
        assert text == RIGHT[variant]
    assert answer(server.client, BASE, QUESTIONS[1], 8) not in RIGHT.values()
    assert set(swaps(server)) == {"upper-folder", BASE}
    assert "evaluated smollm2-json in" in server.log.read_text()
    assert {model.id for model in server.client.models.list()} == {BASE, *RIGHT}


def test_salted_prefixes_stay_cached_and_separate(server: Server) -> None:
    """A variant that is swapped in again finds its own prefix in the cache, and only that."""
    prompt = " ".join(QUESTIONS * 8)
    cold: dict[str, str] = {}
    for variant in (BASE, "upper-folder", BASE, "upper-folder"):
        found = server.client.completions.create(model=variant, prompt=prompt, temperature=0, max_tokens=16)
        cached = found.usage.prompt_tokens_details.cached_tokens or 0
        assert (cached >= 128) == (variant in cold), (variant, cached)
        assert cold.setdefault(variant, found.choices[0].text) == found.choices[0].text
    salted = server.client.completions.create(
        model=BASE, prompt=prompt, temperature=0, max_tokens=16, extra_body={"cache_salt": "mine"}
    )
    assert not salted.usage.prompt_tokens_details.cached_tokens  # the client's own salt counts too


def test_the_api_key_is_checked_first(server: Server) -> None:
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0)
    before = swaps(server)
    for variant in RIGHT:
        with pytest.raises(openai.AuthenticationError):
            answer(stranger, variant, QUESTIONS[1])
    assert swaps(server) == before


def refused(base: Path, folder: Path, *options: str) -> str:
    """The output of a `peanut-serve` that fails to start."""
    (folder / "variants").mkdir(exist_ok=True)
    command = [
        PROGRAM,
        "--base",
        base,
        "--adapters",
        folder / "variants",
        "--state",
        folder / "state",
        "--mode",
        "merged",
    ]
    done = subprocess.run(
        [*map(str, command), "--port", str(free_port()), "--enforce-eager", "--max-model-len", "128", *options],
        capture_output=True,
        text=True,
        env=environment(folder),
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stderr.splitlines()[-1]


def test_a_mixture_of_experts_is_refused(tmp_path: Path, smollm2: Path) -> None:
    """vLLM 0.32 reloads one wrongly on the CPU, without an error."""
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, vocab_size=49152,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    for file in smollm2.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, tmp_path / "base")
    assert "peanut-serve: the engine's answer differs" in refused(tmp_path / "base", tmp_path)
