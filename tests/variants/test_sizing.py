"""What `peanut-serve size` computes is what is allocated and written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config
from safetensors import safe_open
from support.commands import Run
from support.peft_methods import train
from support.tiny_models import Pair, save_adapter, tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache

from converters import merge, open_checkpoint
from peanut_serve.variants.host_cache import host_copy
from peanut_serve.variants.lora_export import LoraLimits
from peanut_serve.variants.opening import VersionOpener
from peanut_serve.variants.sizing import (
    device_copy_bytes,
    engine_bytes,
    engine_dtype,
    key_value_size,
    slot_bytes,
    variant_sizes,
)
from peanut_serve.variants.version import LoadedModel


@pytest.fixture
def tasks(pair: Pair, tmp_path: Path) -> Path:
    """An adapter of rank 4 on two modules, one of rank 40 on another, a merged folder, and what cannot be LoRA."""
    folder = tmp_path / "tasks"
    shutil.copytree(pair.adapter, folder / "small")
    save_adapter(
        AutoModelForCausalLM.from_pretrained(pair.base), folder / "large", r=40, target_modules=["down_proj"]
    )
    merge(pair.base, pair.adapter, folder / "merged")
    ia3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    train(AutoModelForCausalLM.from_pretrained(pair.base), ia3, tmp_path / "other", folder / "scaled")
    return folder


def test_merged_weights_are_what_the_host_cache_allocates(pair: Pair, tasks: Path) -> None:
    base = open_checkpoint(pair.base)
    sizes, refused = variant_sizes(base, [str(tasks)], "merged", "bfloat16")
    assert refused == {}
    opener = VersionOpener(LoadedModel(base, [[name] for name in base.tensors]), "cpu")
    for size in sizes:
        opened = opener.checkpoint if size.name == "merged" else opener.adapter
        weights = opened(size.name, tasks / size.name).evaluate()
        assert size.merged == weights.nbytes > 0, size.name
        weights.close()
    assert {size.name for size in sizes} == {"small", "large", "merged", "scaled"}


@pytest.mark.parametrize("keeps_base", [False, True])
def test_the_copy_on_the_device(pair: Pair, tasks: Path, keeps_base: bool) -> None:
    """Of W0 of what variants change, and of what vLLM may load with it; the host cache has their factors."""
    base = open_checkpoint(pair.base)
    sizes, _ = variant_sizes(base, [str(tasks)], "merged", "bfloat16", keeps_base)
    opener = VersionOpener(LoadedModel(base, [[name] for name in base.tensors]), "cpu", keeps_base=keeps_base)
    weights = opener.adapter("small", tasks / "small").evaluate()
    small = next(size for size in sizes if size.name == "small")
    assert small.merged == weights.nbytes
    weights.close()
    attention = [info.nbytes for info in base.tensors.values() if ".self_attn." in info.name]
    assert device_copy_bytes(base, [small]) == sum(attention)


def test_the_copy_has_to_fit_beside_vllm(pair: Pair, tasks: Path, run_here: Run) -> None:
    command = ("peanut-serve", "size", "--base", pair.base, "--adapters", tasks, "--mode", "merged")
    sized = ("--base-copy", "device", "--max-model-len", "10", "--gpu-memory")
    found = json.loads(run_here(*command, *sized, "10MB", "--json").stdout)
    assert 0 < found["base_copy"] < 1 << 17
    done = run_here(*command, *sized, "1MB", "--gpu-memory-utilization", "0.98")
    assert done.returncode == 1
    assert "--base-copy device takes up to" in done.stderr
    assert "copy of the base on the device     at most" in done.stdout


def test_factors_are_what_is_written(pair: Pair, tasks: Path, tmp_path: Path) -> None:
    base = open_checkpoint(pair.base)
    sizes, refused = variant_sizes(base, [str(tasks)], "auto", "float16")
    assert refused == {}
    found = {size.name: size for size in sizes}
    assert {name: size.rank for name, size in found.items()} == {
        "small": 4, "large": 40, "merged": None, "scaled": None,
    }  # fmt: skip
    opener = VersionOpener(LoadedModel(base, [[name] for name in base.tensors]), "cpu", LoraLimits(512, dtype="fp16"))
    for name in ("small", "large"):
        export = opener.adapter(name, tasks / name).lora
        assert export is not None
        export.write(tmp_path / f"{name}-lora")
        with safe_open(tmp_path / f"{name}-lora" / "adapter_model.safetensors", "pt") as file:
            written = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        assert {tensor.dtype for tensor in written} == {torch.float16}
        assert found[name].factors == sum(tensor.nbytes for tensor in written)
        assert found[name].merged == 0
    # a slot: room for rank 64 in q_proj, v_proj and down_proj of both layers
    assert slot_bytes(base, sizes, "float16") == (64, 2 * 64 * 2 * ((32 + 32) + (16 + 32) + (32 + 72)))


def test_in_lora_mode_the_rest_is_refused(pair: Pair, tasks: Path) -> None:
    sizes, refused = variant_sizes(open_checkpoint(pair.base), [str(tasks)], "lora", "bfloat16")
    assert [size.name for size in sizes] == ["large", "small"]
    assert refused.keys() == {"merged", "scaled"}


@pytest.mark.parametrize("heads", [2, 4])
def test_the_kv_cache_is_what_the_model_keeps(heads: int) -> None:
    model = tiny_llama(num_key_value_heads=heads)
    cache = DynamicCache(config=model.config)
    tokens = 5
    model(torch.zeros(1, tokens, dtype=torch.long), past_key_values=cache)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    size = key_value_size(model.config.to_dict(), 4)
    assert size is not None
    assert size.token * tokens == size.sequence(tokens) == kept


def test_kinds_of_layers() -> None:
    config = {"num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 16, "sliding_window": 100}
    mixed = {**config, "layer_types": ["full_attention"] + ["sliding_attention"] * 3}
    size = key_value_size(mixed, 2)
    assert size is not None
    assert size.sequence(1000) == 2 * 8 * 16 * 2 * (1000 + 3 * 100)
    assert key_value_size({"text_config": mixed}, 2) == size
    assert key_value_size({**config, "layer_types": ["linear_attention"] * 4}, 2) is None
    assert key_value_size({"model_type": "mamba"}, 2) is None
    latent = {"num_hidden_layers": 2, "num_attention_heads": 8, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert key_value_size(latent, 2) is not None
    assert key_value_size(latent, 2).token == 2 * 576 * 2  # type: ignore[union-attr]


def test_the_base(pair: Pair) -> None:
    base = open_checkpoint(pair.base)
    assert engine_dtype(base, "auto") == "bfloat16"  # vLLM never computes float32 checkpoints in float32 by itself
    stored = host_copy(base, base.tensors)
    assert engine_bytes(base, "float32") == sum(info.nbytes for info in stored.tensors.values())
    assert engine_bytes(base, "bfloat16") * 2 == engine_bytes(base, "float32")
    stored.close()


def test_the_command(pair: Pair, tasks: Path, run_here: Run) -> None:
    command = ("peanut-serve", "size", "--base", pair.base, "--adapters", tasks)
    done = run_here(*command, "--mode", "auto", "--gpu-memory", "1GB", "--max-model-len", "100", "--json")
    found = json.loads(done.stdout)
    weights = found["engine"] + found["lora_bytes"]
    assert (found["lora_slots"], found["lora_rank"]) == (2, 64)
    assert found["gpu"]["left"] == 920_000_000 - weights
    assert found["gpu"]["sequences"] == found["gpu"]["left"] // (100 * found["kv_token"])
    assert found["host_cache"]["all"] == sum(variant["merged"] for variant in found["variants"])
    assert found["host_cache"]["at_once"] == 2
    done = run_here(*command, "--gpu-memory", "1MB", "--gpu-memory-utilization", "0.01")
    assert (done.returncode, "--gpu-memory 1MB is too small: the weights alone" in done.stderr) == (1, True)
    assert "small                              LoRA of rank 4" in done.stdout
    assert "note: merged will not be served: " in done.stderr
    done = run_here("peanut-serve", "size", "--base", "org/base", "--adapters", tasks)
    assert "there is no folder org/base; download the base first, with: hf download org/base" in done.stderr


@pytest.mark.parametrize(
    ("base", "advice"),
    [
        ("/nonexistent", "it is not a valid Hub id; check the path"),
        ("./org/base", "it is not a valid Hub id; check the path"),
        ("~/base", "it is not a valid Hub id; check the path"),
        ("a/b/c", "it is not a valid Hub id; check the path"),
        ("llama2-7b", "download the base first, with: hf download meta-llama/Llama-2-7b-hf"),
    ],
)
def test_a_base_that_is_not_there(run_here: Run, base: str, advice: str) -> None:
    done = run_here("peanut-serve", "size", "--base", base, "--adapters", "org/adapter")
    assert (done.returncode, f"there is no folder {base}" in done.stderr, advice in done.stderr) == (1, True, True)


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_a_base_that_is_a_file(name: str, tmp_path: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose name could be that of a model on the Hub."""
    (tmp_path / name).touch()
    (tmp_path / "tasks").mkdir()
    monkeypatch.chdir(tmp_path)
    reason = "a GGUF" if name.endswith(".gguf") else "is a file; expected the folder with"
    for command in (("peanut-serve", "size"), ("peanut-serve",)):
        done = run_here(*command, "--base", name, "--adapters", "tasks")
        assert (done.returncode, name in done.stderr, reason in done.stderr) == (1, True, True), done.stderr
