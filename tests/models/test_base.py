"""Opening a base, and comparing it with the base the adapter was trained on."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import Pair, edit_config, save_adapter, tiny_llama, unmerged
from support.zoo import output_of
from transformers import LlamaForCausalLM

from converters import load_adapter, merge, open_checkpoint, prepare_merge, record_base, run_merge
from converters.errors import (
    AdapterConfigError,
    AlreadyMergedError,
    BaseMismatchError,
    CheckpointError,
    OptionError,
    QuantizedBaseError,
)
from converters.hub.names import SHORT_NAMES, is_hub_id


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_fingerprint_depends_on_the_weights_not_the_files(pair: Pair, tmp_path: Path) -> None:
    first = open_checkpoint(pair.base).fingerprint
    tiny_llama().from_pretrained(pair.base).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(open_checkpoint(tmp_path / "sharded").shards) > 2
    assert open_checkpoint(tmp_path / "sharded").fingerprint == first
    resave(pair.base, lambda w: w["model.norm.weight"].view(-1)[:1].add_(1e-6))
    assert open_checkpoint(pair.base).fingerprint != first


def test_the_fingerprint_samples_large_tensors_up_to_their_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = {"w": torch.zeros(1000, 100)}
    found = set()
    for index in (None, 0, -1):
        if index is not None:
            weights["w"].zero_().view(-1)[index] = 1
        save_file(weights, tmp_path / "model.safetensors")
        found.add(open_checkpoint(tmp_path).fingerprint)
    assert len(found) == 3


def test_a_recorded_base_is_enforced(pair: Pair) -> None:
    path = record_base(load_adapter(pair.adapter), open_checkpoint(pair.base))
    assert path == pair.adapter / "peanut_base.json"
    prepare_merge(pair.base, pair.adapter)
    resave(pair.base, lambda w: w["lm_head.weight"].add_(1))
    with pytest.raises(BaseMismatchError, match=r"on a base with fingerprint sampled-sha256:.*force_base=True"):
        prepare_merge(pair.base, pair.adapter)
    notes = prepare_merge(pair.base, pair.adapter, force_base=True).notes
    assert any(note.startswith("forced: the adapter was recorded on") for note in notes)
    path.write_text('{"fingerprint": 3}')
    with pytest.raises(AdapterConfigError, match="'3' is not a valid fingerprint"):
        load_adapter(pair.adapter)
    path.write_text("[")
    with pytest.raises(AdapterConfigError, match="cannot read the record of the base"):
        load_adapter(pair.adapter)


def test_a_base_of_other_shapes_is_refused(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = make_pair()
    tiny_llama(hidden_size=64, num_attention_heads=8).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match=r"has shape \(64, 64\), θ was trained for out = 32"):
        prepare_merge(tmp_path / "other", pair.adapter)


def test_a_local_folder_under_another_name_is_only_noted(pair: Pair) -> None:
    edit_config(pair.adapter, base_model_name_or_path="meta-llama/Llama-2-7b-hf")
    (note,) = prepare_merge(pair.base, pair.adapter).notes
    assert note == (
        "the adapter was trained on 'meta-llama/Llama-2-7b-hf'; the local base is taken for the same weights"
    )
    edit_config(pair.adapter, base_model_name_or_path="/mnt/disk/base/")
    assert prepare_merge(pair.base, pair.adapter).notes == ()


def test_a_merged_base_is_refused_unless_the_adapter_was_trained_on_it(pair: Pair) -> None:
    merge(pair.base, pair.adapter, pair.output)
    again = pair.output.with_name("twice")
    with pytest.raises(
        AlreadyMergedError, match="was written by peanut-merge.* only right on the W0 it was trained on"
    ):
        merge(pair.output, pair.adapter, again)
    assert not again.exists()
    assert any("forced" in n for n in prepare_merge(pair.output, pair.adapter, force_base=True).notes)
    second = again.with_name("second-adapter")
    save_adapter(tiny_llama().from_pretrained(pair.output), second, seed=2)
    record_base(load_adapter(second), open_checkpoint(pair.output))
    merge(pair.output, second, again)
    merged = tiny_llama().from_pretrained(again).eval()
    ids = {"input_ids": torch.arange(3, 12)[None]}
    expected = output_of(unmerged(LlamaForCausalLM, pair.output, second), ids)
    assert (output_of(merged, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"other": 1}, "unknown method"),
    ],
)
def test_a_quantised_base_is_named_and_refused(pair: Pair, settings: dict, name: str) -> None:
    edit_json(pair.base / "config.json", quantization_config=settings)
    with pytest.raises(
        QuantizedBaseError, match=rf"is quantised \({name}\): merge into the weights in training prec"
    ):
        prepare_merge(pair.base, pair.adapter)


@pytest.mark.parametrize("change", [
    lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(72, 32).to(torch.float8_e4m3fn)}),
    lambda w: w.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.zeros(1)}),
    lambda w: w.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, dtype=torch.int32)}),
    lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(72, 4, dtype=torch.int32)}),
    lambda w: w.update({"model.layers.0.mlp.up_proj.W_q": torch.zeros(4, dtype=torch.int16)}),
])  # fmt: skip
def test_quantised_tensors_without_a_config_are_refused(pair: Pair, change: Callable[..., object]) -> None:
    resave(pair.base, change)
    with pytest.raises(QuantizedBaseError, match="model.layers.0.mlp.up_proj"):
        prepare_merge(pair.base, pair.adapter)


@pytest.mark.parametrize("keep", [0, 7, 50, 5000, -1])
def test_a_truncated_base_is_refused(pair: Pair, keep: int) -> None:
    file = pair.base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a whole safetensors file .* fetch it again"):
        prepare_merge(pair.base, pair.adapter)


def test_a_base_that_shrinks_while_it_is_read(pair: Pair) -> None:
    plan = prepare_merge(pair.base, pair.adapter)
    file = pair.base / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4000)
    with pytest.raises(CheckpointError, match=r"ended in the middle of .* truncated while it was read"):
        run_merge(plan, pair.output)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened .*No such file"):
        run_merge(plan, pair.output)
    assert sorted(p.name for p in pair.base.parent.iterdir()) == ["adapter", "base"]


def test_a_header_that_does_not_match_the_data_is_refused(pair: Pair) -> None:
    file = pair.base / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[96,32]', b'"shape":[95,32]', 1))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        prepare_merge(pair.base, pair.adapter)


def test_incomplete_shards(pair: Pair, tmp_path: Path) -> None:
    base = tmp_path / "sharded"
    tiny_llama().save_pretrained(base, max_shard_size="20KB")
    index = base / "model.safetensors.index.json"
    shards = sorted(base.glob("model-*.safetensors"))
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], "ghost": shards[0].name}}))
    with pytest.raises(CheckpointError, match="disagree on 1 tensors, for example ghost"):
        prepare_merge(base, pair.adapter)
    index.write_text(json.dumps({**content, "weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="is not a file name in the same folder"):
        prepare_merge(base, pair.adapter)
    index.write_text(json.dumps({"weight_map": {"x": 3}}))
    with pytest.raises(CheckpointError, match="'3' is not a file name"):
        prepare_merge(base, pair.adapter)
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(CheckpointError, match="no weight_map"):
        prepare_merge(base, pair.adapter)
    index.write_text(json.dumps(content))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"the shard {shards[1].name} is missing"):
        prepare_merge(base, pair.adapter)


def test_folders_that_are_not_a_base(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is an adapter, expected a base model; pass it as the adapter"):
        prepare_merge(pair.adapter, pair.adapter)
    with pytest.raises(CheckpointError, match="no folder .*/nowhere, and it is not a valid Hub id"):
        prepare_merge(tmp_path / "nowhere", pair.adapter)
    with pytest.raises(CheckpointError, match="is a file; expected the folder"):
        prepare_merge(pair.base / "config.json", pair.adapter)
    with pytest.raises(CheckpointError, match=r"no config.json; expected a folder with a transformers model"):
        prepare_merge(tmp_path, pair.adapter)
    with pytest.raises(OptionError, match="revision='main' has no meaning for the local folder .*; leave it out"):
        prepare_merge(pair.base, pair.adapter, revision="main")
    (pair.base / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="the model config is a JSON list"):
        prepare_merge(pair.base, pair.adapter)


def test_pickled_weights_are_refused_with_a_way_to_convert_them(pair: Pair) -> None:
    file = pair.base / "model.safetensors"
    torch.save(load_file(file), pair.base / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(
        CheckpointError, match=r"as pickles \(pytorch_model.bin\), expected safetensors; .*save_pretrain"
    ):
        prepare_merge(pair.base, pair.adapter)
    (pair.base / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        prepare_merge(pair.base, pair.adapter)


def test_a_local_folder_wins_over_a_short_name(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters.models.finding import find_base

    monkeypatch.chdir(pair.base.parent)
    pair.base.rename("llama2-7b")
    source = find_base("llama2-7b")
    assert source.folder == Path("llama2-7b")
    assert source.note == "base: the local folder llama2-7b (not meta-llama/Llama-2-7b-hf on the Hub)"
    plan = prepare_merge("llama2-7b", pair.adapter)
    assert source.note in plan.notes


def test_names_on_the_hub() -> None:
    assert set(SHORT_NAMES) == {"llama2-7b", "llama3-8b", "qwen3-8b", "roberta-base", "vit-base"}
    assert all(is_hub_id(name) for name in SHORT_NAMES.values())
    for name in ("../x", "/abs/path", "a/b/c", "./here", "a/..", "", "a b"):
        assert not is_hub_id(name)
