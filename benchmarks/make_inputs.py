"""What the benchmarks merge: random Llamas of 1.1B and 7B parameters, and random adapters.

python benchmarks/make_inputs.py FOLDER [--7b | --only-1b]
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeanutConfig
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LLAMA_1B = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
)
LLAMA_7B = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    dtype="float16",
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
)
SHARD_BYTES = 4_900_000_000


def llama_shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint, in the order of its layers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        for name, out in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            yield f"{at}self_attn.{name}_proj.weight", (out, hidden)
        yield f"{at}mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}mlp.up_proj.weight", (inner, hidden)
        yield f"{at}mlp.down_proj.weight", (hidden, inner)
        yield f"{at}input_layernorm.weight", (hidden,)
        yield f"{at}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)


def make_base(config: LlamaConfig, folder: Path) -> None:
    """Write a random checkpoint shard by shard; one shard is in memory at a time."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in llama_shapes(config):
        nbytes = 2 * torch.Size(shape).numel()
        if size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(names) > 1 else ["model.safetensors"]
    # numbers are drawn once and cut out at random places: drawing 7B takes minutes
    pool = (torch.randn(150_000_000) * 0.02).to(config.dtype)
    for file, shard in zip(names, shards, strict=True):
        save_file({name: cut(pool, shape) for name, shape in shard}, folder / file, metadata={"format": "pt"})
    if len(names) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)  # last: it marks the folder as whole


def cut(pool: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A copy of a random piece of `pool`."""
    size = torch.Size(shape).numel()
    start = int(torch.randint(pool.numel() - size, ()))
    return pool[start : start + size].reshape(shape).clone()


def make_adapter(base: Path, adapter: Path, r: int) -> None:
    """An adapter on `base` with random θ, as PEFT saves it (columns orientation, depth 0)."""
    if (adapter / "adapter_config.json").exists():
        return
    theta = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                module = name.removesuffix(".weight")
                if module.rsplit(".", 1)[-1] in TARGETS:
                    out = weights.get_slice(name).get_shape()[0]
                    at = f"base_model.model.{module}.peanut_"
                    theta[f"{at}A.weight"] = torch.randn(r, out) * 0.02
                    theta[f"{at}B.weight"] = torch.randn(out, r) * 0.02
    adapter.mkdir(parents=True, exist_ok=True)
    save_file(theta, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = PeanutConfig(r=r, target_modules=TARGETS, scaling=0.1, task_type="CAUSAL_LM", inference_mode=True)
    settings.save_pretrained(adapter)


def main() -> None:
    """Make what is not there."""
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    if "--only-1b" not in sys.argv:
        make_adapter(folder.parent / "bases" / "smollm2-135m-instruct", folder / "adapter-135m", 32)
    make_base(LLAMA_1B, folder / "llama-1.1b")
    make_adapter(folder / "llama-1.1b", folder / "adapter-1.1b", 32)
    if "--7b" in sys.argv:
        make_base(LLAMA_7B, folder / "llama-7b")
        for r in (32, 64):
            make_adapter(folder / "llama-7b", folder / f"adapter-7b-r{r}", r)


if __name__ == "__main__":
    main()
