"""The output folder: shards, config, companions, manifest, model card."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.tiny_models import Pair, tiny_llama
from transformers import LlamaForCausalLM

from converters import merge, prepare_merge
from converters.errors import OptionError
from converters.files.sizes import parse_size

MANIFEST = "peanut_manifest.json"


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("limit", ["20KB", "32KiB", "5GB"])
def test_shards_and_index(pair: Pair, limit: str) -> None:
    merge(pair.base, pair.adapter, pair.output, max_shard_size=limit)
    single = pair.output.with_name("single")
    merge(pair.base, pair.adapter, single)
    merged = weights(single)
    if limit == "5GB":
        assert not (pair.output / "model.safetensors.index.json").exists()
        assert weights(pair.output).keys() == merged.keys()
        return
    index = json.loads((pair.output / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(pair.output / shard)[name], merged[name])
    for shard in shards:
        loaded = load_file(pair.output / shard)
        assert len(loaded) == 1 or sum(t.nbytes for t in loaded.values()) <= parse_size(limit)
    ids = torch.arange(3, 12)[None]
    both = [LlamaForCausalLM.from_pretrained(folder)(ids).logits for folder in (pair.output, single)]
    assert torch.equal(*both)


def test_the_bases_own_sharding(pair: Pair, tmp_path: Path) -> None:
    base = tmp_path / "sharded"
    LlamaForCausalLM.from_pretrained(pair.base).save_pretrained(base, max_shard_size="20KB")
    merge(base, pair.adapter, pair.output, max_shard_size="base")
    before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, pair.output))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2GiB", 2 << 30), ("1.5KB", 1500), ("base", None)]
)
def test_sizes(text: str, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0GB", "5 apples"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionError, match="is not a valid size; expected something like 5GB"):
        parse_size(text)


def test_companions_are_carried_and_the_adapters_win(pair: Pair) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "preprocessor_config.json", "LICENSE"):
        (pair.base / name).write_text("base")
    (pair.base / "chat_template.jinja").write_text("base")
    (pair.base / "pytorch_model.bin.index.json").write_text("{}")
    (pair.base / "additional_chat_templates").mkdir()
    (pair.base / "additional_chat_templates" / "tool.jinja").write_text("base")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (pair.adapter / name).write_text("adapter")
    (pair.adapter / "trainer_state.json").write_text("{}")
    merge(pair.base, pair.adapter, pair.output)
    found = {name: (pair.output / name).read_text() for name in content(pair.output) if "safetensors" not in name}
    assert found["tokenizer.json"] == "adapter"
    assert found["special_tokens_map.json"] == "adapter"
    # the adapter brings a tokenizer: the base's parts of another would only mix with it
    assert "merges.txt" not in found
    assert "tokenizer_config.json" not in found
    assert found["preprocessor_config.json"] == found["LICENSE"] == found["chat_template.jinja"] == "base"
    assert found["additional_chat_templates/tool.jinja"] == "base"
    assert set(found) == {
        "README.md", "config.json", "generation_config.json", MANIFEST, "tokenizer.json", "special_tokens_map.json",
        "preprocessor_config.json", "LICENSE", "chat_template.jinja", "additional_chat_templates/tool.jinja",
    }  # fmt: skip


def test_the_config_states_the_true_dtype_in_every_spelling(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(dtype=torch.bfloat16)
    path = pair.base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "torch_dtype": "float32", "text_config": {"dtype": "float32", "x": 1}}))
    merge(pair.base, pair.adapter, pair.output)
    merged = json.loads((pair.output / "config.json").read_text())
    assert merged["dtype"] == merged["torch_dtype"] == merged["text_config"]["dtype"] == "bfloat16"
    assert {k: v for k, v in merged.items() if k not in ("torch_dtype", "text_config")} == config


def test_manifest(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(modules_to_save=["lm_head"])
    result = merge(pair.base, pair.adapter, pair.output)
    manifest = json.loads((pair.output / MANIFEST).read_text())
    actions = {name: entry["action"] for name, entry in manifest["tensors"].items()}
    assert actions["model.layers.0.self_attn.q_proj.weight"] == "updated"
    assert actions["lm_head.weight"] == "replaced"
    assert actions["model.norm.weight"] == "kept"
    assert set(actions) == set(weights(pair.output))
    assert manifest["base"]["fingerprint"] == result.plan.base.fingerprint
    assert manifest["adapters"][0]["digest"] == result.plan.head.digest
    assert manifest["verified"]["tensors"] == len(actions)
    assert manifest["options"] == {"dtype": "auto", "max_shard_size": 5 * 10**9, "labels": None, "force_base": False}
    assert set(manifest["versions"]) == {"python", "torch", "transformers", "safetensors"}
    assert str(pair.base.parent) not in (pair.output / MANIFEST).read_text()


def test_model_card(pair: Pair) -> None:
    config = json.loads((pair.adapter / "adapter_config.json").read_text())
    for name, expected in (("org/model", "org/model"), ("/home/someone/model", None), ("./x", None)):
        changed = json.dumps({**config, "base_model_name_or_path": name})
        (pair.adapter / "adapter_config.json").write_text(changed)
        merge(pair.base, pair.adapter, pair.output)
        card = ModelCard.load(pair.output / "README.md")
        assert card.data.base_model == expected
        assert card.data.tags == ["peanut", "peft", "merged"]
        assert card.data.pipeline_tag == "text-generation"
        assert "/home/someone" not in card.content
        shutil.rmtree(pair.output)


def test_the_same_merge_gives_the_same_bytes(pair: Pair) -> None:
    again = pair.output.with_name("again")
    merge(pair.base, pair.adapter, pair.output)
    torch.set_num_threads(1)
    try:
        merge(pair.base, pair.adapter, again)
    finally:
        torch.set_num_threads(2)
    assert content(pair.output) == content(again)


def test_default_output(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair.base.parent)
    assert merge("base", "adapter").output == Path("base-adapter")
    assert (pair.base.parent / "base-adapter" / "config.json").exists()


def test_the_base_is_never_changed(pair: Pair) -> None:
    before = content(pair.base), content(pair.adapter)
    merge(pair.base, pair.adapter, pair.output, dtype="bf16")
    assert (content(pair.base), content(pair.adapter)) == before


def test_a_plan_writes_nothing(pair: Pair) -> None:
    plan = prepare_merge(pair.base, pair.adapter)
    assert plan.total_size == sum(t.nbytes for t in weights(pair.base).values())
    assert sorted(p.name for p in pair.base.parent.iterdir()) == ["adapter", "base"]


def test_tensors_are_aligned_also_with_mixed_dtypes(pair: Pair) -> None:
    from converters.files.header import read_header

    mixed = tiny_llama().to(torch.bfloat16)
    mixed.model.norm.weight.data = mixed.model.norm.weight.data.float()
    mixed.save_pretrained(pair.base)
    merge(pair.base, pair.adapter, pair.output)
    infos, _ = read_header(pair.output / "model.safetensors")
    assert {info.dtype for info in infos} == {"BF16", "F32"}
    assert all(info.offset % info.torch_dtype.itemsize == 0 for info in infos)
