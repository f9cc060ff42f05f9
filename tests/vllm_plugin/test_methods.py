"""Variants of every kind of method, swapped in the real vLLM; PEFT's unmerged model is the oracle."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from peft import (
    HRAConfig,
    IA3Config,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    RoadConfig,
    VeraConfig,
)
from support.engines.serving import Server, free_port, serving
from support.peft_methods import train
from transformers import Qwen2Config, Qwen2ForCausalLM

pytestmark = pytest.mark.vllm

PROMPT = list(range(100, 148))
COUNT = 8
SOME = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
# q, k and v are one fused layer in vLLM, with biases, which (IA)³ and RoAd change as well
MERGED: dict[str, PeftConfig] = {
    "dora": LoraConfig(r=4, use_dora=True, **SOME),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "oft": OFTConfig(oft_block_size=8, **SOME),
    "road": RoadConfig(group_size=8, **SOME),
}
AS_LORA: dict[str, PeftConfig] = {
    "vera": VeraConfig(r=8, d_initial=1.0, **SOME),
    "hra": HRAConfig(r=8, **SOME),
    "lokr": LoKrConfig(r=2, decompose_both=True, decompose_factor=8, **SOME),
}
CONFIGS = {**MERGED, **AS_LORA}


def tiny_qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(3)
    config = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=49152, initializer_range=0.2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, and an adapter of each method."""
    folder = tmp_path_factory.mktemp("methods")
    for name, config in CONFIGS.items():
        train(tiny_qwen2(), config, folder / "base", folder / "variants" / name)
    for file in smollm2.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, folder / "base")
    return folder


@pytest.fixture(scope="module")
def admin_port() -> str:
    return str(free_port())


@pytest.fixture(scope="module")
def server(folder: Path, admin_port: str) -> Iterator[Server]:
    """Those of `AS_LORA` are in every batch, the others are swapped."""
    options = (
        "--mode", "auto", "--state", str(folder / "state"), "--dtype", "float32", "--max-model-len", "128",
        "--enforce-eager", "--admin-port", admin_port,
    )  # fmt: skip
    with serving(folder / "base", folder / "variants", folder, *options, PEANUT_ADMIN_KEY="secret") as running:
        yield running


def kinds(port: str) -> dict[str, str]:
    """How every variant is served."""
    found = httpx.get(
        f"http://127.0.0.1:{port}/admin/v1/variants", headers={"Authorization": "Bearer secret"}, timeout=60
    )
    return {variant["name"]: variant["kind"] for variant in found.json()}


def expected(folder: Path, name: str) -> list[str]:
    """Greedy tokens of PEFT's unmerged model."""
    model = Qwen2ForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, folder / "variants" / name).eval() if name in CONFIGS else model.eval()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(COUNT):
            ids = torch.cat([ids, adapted(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return [f"token_id:{token}" for token in ids[0, len(PROMPT) :].tolist()]


def test_every_method_answers_as_peft_does(server: Server, folder: Path, admin_port: str) -> None:
    """In several orders, so that each follows the weights of another; the base last."""
    wanted = {name: expected(folder, name) for name in ("base", *CONFIGS)}
    assert len({tuple(tokens) for tokens in wanted.values()}) == len(wanted)  # an answer identifies its variant
    for name in ("dora", "vera", "ia3", "base", "oft", "hra", "ia3", "lokr", "road", "dora", "vera", "base"):
        found = server.client.completions.create(
            model=name, prompt=PROMPT, temperature=0, max_tokens=COUNT, logprobs=0,
            extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        assert found.choices[0].logprobs.tokens == wanted[name], name
    wanted_kinds = {"base": "base"} | dict.fromkeys(MERGED, "adapter") | dict.fromkeys(AS_LORA, "lora")
    assert kinds(admin_port) == wanted_kinds
