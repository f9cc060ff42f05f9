"""Which tensors are sent as exact factors, and that these are the update: for adapters of many methods."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, OFTConfig
from support.peft_methods import train
from support.tiny_models import Pair, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from converters import merge
from converters.errors import NonFiniteError
from converters.files.reader import TensorReader
from converters.models.checkpoint import Checkpoint, open_checkpoint
from peanut_serve.variants.on_device.places import UpdatedTensor
from peanut_serve.variants.opening import VersionOpener, adapter_version
from peanut_serve.variants.version import LoadedModel, Version

MakePair = Callable[..., Pair]


def factored(base: Checkpoint, adapter: Path) -> Version:
    model = LoadedModel(base, [[name] for name in base.tensors])
    return adapter_version("v", adapter, VersionOpener(model, "cpu", keeps_base=True))


def check(version: Version, merged: Checkpoint) -> dict[str, UpdatedTensor]:
    """Compare every tensor of a version with the merged checkpoint; returns those that are factored."""
    weights, found = version.evaluate(), {}
    with TensorReader() as reader:
        for name, place in weights.places.items():
            wanted = reader.whole(merged.tensors[name])
            if isinstance(place, UpdatedTensor):
                found[name] = place
                up, down = reader.whole(place.up).double(), reader.whole(place.down).double()
                update = wanted.double() - reader.whole(place.base).double()
                assert torch.allclose(up @ down, update, atol=1e-2 if wanted.dtype is torch.bfloat16 else 1e-6), name
                assert update.abs().max() > 1e-3
            else:
                assert torch.equal(reader.whole(place), wanted), name
    assert weights.digests.keys() == weights.places.keys() == {spec.name for spec in version.specs}
    assert weights.nbytes >= version.nbytes
    weights.close()
    return found


def test_a_peanut_adapter(make_pair: MakePair) -> None:
    """What is small next to its factors is sent whole, beside the others."""
    pair = make_pair(
        None, torch.bfloat16, target_modules=["q_proj", "v_proj", "up_proj"], modules_to_save=["lm_head"]
    )
    merge(pair.base, pair.adapter, pair.output)
    base = open_checkpoint(pair.base)
    found = check(factored(base, pair.adapter), open_checkpoint(pair.output))
    assert {name.split(".")[-2] for name in found} == {"q_proj", "up_proj", "v_proj"} - (
        set() if 2 * (32 + 16) * 4 * 4 <= 32 * 16 * 2 else {"v_proj"}
    )
    assert all(place.up.dtype == "F32" for place in found.values())


def test_float32_has_factors_in_float64(make_pair: MakePair) -> None:
    pair = make_pair(tiny_llama(hidden_size=64))
    merge(pair.base, pair.adapter, pair.output)
    found = check(factored(open_checkpoint(pair.base), pair.adapter), open_checkpoint(pair.output))
    assert found
    assert all(place.up.dtype == place.down.dtype == "F64" for place in found.values())


def test_weights_that_are_stored_transposed(tmp_path: Path) -> None:
    """GPT-2 stores (in, out): the factors are those of what is stored."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=32)
    model = GPT2LMHeadModel(config)
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    train(model, lora, tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = check(
        factored(open_checkpoint(tmp_path / "base"), tmp_path / "adapter"), open_checkpoint(tmp_path / "merged")
    )
    assert {place.base.shape for place in found.values()} == {(64, 192), (64, 256)}


def test_a_method_without_factors_goes_the_other_way(tmp_path: Path) -> None:
    pair = Pair(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    oft = OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"], init_weights=False)
    train(tiny_llama(hidden_size=64), oft, pair.base, pair.adapter)
    merge(pair.base, pair.adapter, pair.output)
    version = factored(open_checkpoint(pair.base), pair.adapter)
    assert check(version, open_checkpoint(pair.output)) == {}
    assert version.nbytes == sum(spec.nbytes for spec in version.specs)


def test_factors_that_are_not_finite_are_refused(make_pair: MakePair) -> None:
    pair = make_pair(tiny_llama(hidden_size=64), torch.bfloat16, scaling=1e60)
    version = factored(open_checkpoint(pair.base), pair.adapter)
    with pytest.raises(NonFiniteError, match="of its update is not finite"):
        version.evaluate()
