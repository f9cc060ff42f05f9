"""Weights in several files with an index, and what a distributed training saved without putting it together."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny_models import edit_weights, tiny_llama
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from converters import load_adapter, merge
from converters.errors import PeanutError, ThetaError

FILE = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def split(adapter: Path, ending: str = "safetensors") -> list[Path]:
    """Distribute the weights of an adapter over two files."""
    weights = load_file(adapter / FILE)
    (adapter / FILE).unlink()
    shards = [adapter / f"adapter_model-{i:05}-of-00002.{ending}" for i in (1, 2)]
    names = sorted(weights)
    for shard, some in zip(shards, (names[::2], names[1::2]), strict=True):
        part = {name: weights[name] for name in some}
        save_file(part, shard, metadata={"format": "pt"}) if ending == "safetensors" else torch.save(part, shard)
    weight_map = {name: shards[place % 2].name for place, name in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (adapter / f"adapter_model.{ending}.index.json").write_text(json.dumps(index))
    return shards


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_adapter_in_shards_is_the_same_adapter(adapter: Path, tmp_path: Path, ending: str) -> None:
    merge(tmp_path / "base", adapter, tmp_path / "whole")
    digest = load_adapter(adapter).digest
    split(adapter, ending)
    assert load_adapter(adapter).digest == digest
    assert load_adapter(adapter / f"adapter_model.{ending}.index.json").digest == digest
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    whole, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "merged"))
    assert all(torch.equal(merged[name], whole[name]) for name in whole)


def test_one_shard_is_not_an_adapter(adapter: Path) -> None:
    shard = split(adapter)[0]
    with pytest.raises(ThetaError, match="is one of 2 shards, and has a part of the adapter"):
        load_adapter(shard)


def without_a_key(adapter: Path, shards: list[Path]) -> None:
    edit_weights(shards[0], lambda w: w.popitem())


def with_a_key_twice(adapter: Path, shards: list[Path]) -> None:
    edit_weights(shards[0], lambda w: {**load_file(shards[1]), **w})


def outside(adapter: Path, shards: list[Path]) -> None:
    path = adapter / f"{FILE}.index.json"
    path.write_text(path.read_text().replace("adapter_model-00002", "../adapter_model-00002"))


DAMAGE: dict[str, tuple[Callable[[Path, list[Path]], object], str]] = {
    "missing": (
        lambda _, shards: shards[1].unlink(),
        "the shard adapter_model-00002-of-00002.safetensors is missing",
    ),
    "a key less": (without_a_key, "index.json and the shards disagree, for example on base_model"),
    "a key twice": (with_a_key_twice, "is in adapter_model-00001-of-00002.* and in adapter_model-00002-of-00002"),
    "outside": (outside, "is not a file name in the same folder"),
    "no map": (lambda a, _: (a / f"{FILE}.index.json").write_text("{}"), "has no weight_map"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_shards_that_do_not_belong_together_are_refused(adapter: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(adapter, split(adapter))
    with pytest.raises(ThetaError, match=message):
        load_adapter(adapter)


def test_a_shard_that_changes_meanwhile_is_noticed(adapter: Path) -> None:
    shards = split(adapter)
    opened = load_adapter(adapter)
    opened.store.check_unchanged()
    edit_weights(shards[1], lambda w: {name: tensor + 1 for name, tensor in w.items()})
    with pytest.raises(ThetaError, match="changed while it was merged"):
        opened.store.check_unchanged()


def emptied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(0) for name in weights}


def flattened(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.flatten()[: tensor.numel() // 2].clone() for name, tensor in weights.items()}


def one_parameter(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"_fsdp_wrapped_module._flat_param": torch.cat([tensor.flatten() for tensor in weights.values()])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (emptied, "8 of 8 tensors are empty.*ZeRO-3.*stage3_gather_16bit_weights_on_model_save.*zero_to_fp32"),
        (flattened, r"lora_A.weight has shape \(144,\), and is a flattened parameter.*FULL_STATE_DICT"),
        (one_parameter, "_flat_param has shape .*FSDP saved what one process held.*FULL_STATE_DICT"),
    ],
)
def test_what_was_not_gathered_is_refused(adapter: Path, change: Callable, message: str) -> None:
    edit_weights(adapter / FILE, change)
    with pytest.raises(ThetaError, match=message):
        load_adapter(adapter)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model_fsdp_0/__0_0.distcp", "as FSDP saves it.*merge-weights"),
        ("pytorch_model_fsdp_rank1.bin", "as FSDP saves it.*FULL_STATE_DICT"),
        (
            "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "a checkpoint of DeepSpeed ZeRO.*zero_to_fp32",
        ),
    ],
)
def test_the_files_of_a_distributed_checkpoint_are_named(adapter: Path, file: str, message: str) -> None:
    (adapter / FILE).unlink()
    (adapter / file).parent.mkdir(exist_ok=True)
    for name in (file, file.replace("0", "2").replace("rank1", "rank0")):
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_bytes(b"")
    with pytest.raises(PeanutError, match=message):
        load_adapter(adapter)


def test_tensors_of_a_mesh_are_refused(adapter: Path) -> None:
    """DTensor states the shape of the whole, and a pickle has one process's part of it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weights: dict[str, DTensor] = {
            name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in load_file(adapter / FILE).items()
        }
        torch.save(weights, adapter / "adapter_model.bin")
        (adapter / FILE).unlink()
        with pytest.raises(ThetaError, match="distributed over several processes.*FULL_STATE_DICT"):
            load_adapter(adapter)
    finally:
        dist.destroy_process_group()
    with pytest.raises(ThetaError, match="distributed over several processes"):
        load_adapter(adapter)
