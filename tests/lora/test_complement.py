"""A variant beside the merged weights of another: `W0 + Δ_resident + complement == W0 + Δ_own`, in every module."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.tiny_models import Pair, edit_json, save_adapter, tiny_llama, unmerged
from transformers import LlamaForCausalLM

from converters import merge, open_checkpoint
from converters.errors import OutputExistsError
from peanut_serve.errors import VariantError
from peanut_serve.lora.cache import LoraCache
from peanut_serve.lora.complement import RESIDENT, Factors, complement, complement_export, write_complement
from peanut_serve.lora.slots import rank_of_pairs, unfit_pairs
from peanut_serve.variants.lora_export import LoraExport, LoraLimits
from peanut_serve.variants.opening import VersionOpener, adapter_version
from peanut_serve.variants.version import LoadedModel, Version

SHAPES = {"q": (6, 5), "k": (3, 5), "down": (5, 9)}


def random_factors(ranks: dict[str, int], seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {name: (draw(SHAPES[name][0], r), draw(r, SHAPES[name][1])) for name, r in ranks.items()}


def delta(factors: Factors, module: str) -> torch.Tensor:
    if module not in factors:
        return torch.zeros(SHAPES[module], dtype=torch.float64)
    up, down = factors[module]
    return up @ down


RANKS = st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 4))


@given(RANKS, RANKS)
def test_the_sum_is_the_variant(own_ranks: dict[str, int], resident_ranks: dict[str, int]) -> None:
    own, resident = random_factors(own_ranks, 0), random_factors(resident_ranks, 1)
    found = complement(own, resident)
    assert set(found) == {*own, *resident}
    for module, shape in SHAPES.items():
        w0 = torch.randn(shape, dtype=torch.float64)
        merged = w0 + delta(resident, module)
        torch.testing.assert_close(merged + delta(found, module), w0 + delta(own, module), rtol=0, atol=1e-12)
        if module in found:
            assert found[module][1].shape[0] == own_ranks.get(module, 0) + resident_ranks.get(module, 0)


def test_the_base_is_the_negated_resident() -> None:
    resident = random_factors({"q": 2, "down": 3}, 0)
    found = complement({}, resident)
    for module in resident:
        assert torch.equal(delta(found, module), -delta(resident, module))


def test_different_shapes_are_refused() -> None:
    own, resident = random_factors({"q": 2}, 0), {"q": (torch.zeros(7, 1), torch.zeros(1, 5))}
    with pytest.raises(VariantError, match=r"q has the shapes \[\(6, 5\), \(7, 5\)\] in two adapters of one base"):
        complement(own, resident)


Open = Callable[[Path, str], Version]


@pytest.fixture
def open_version(pair: Pair) -> Open:
    base = open_checkpoint(pair.base)
    model = LoadedModel(base, [[name] for name in base.tensors])

    def call(adapter: Path, dtype: str = "fp32") -> Version:
        return adapter_version("v", adapter, VersionOpener(model, "cpu", LoraLimits(64, None, dtype)))

    return call


@pytest.fixture
def cache(tmp_path: Path) -> LoraCache:
    return LoraCache(tmp_path / "cache", 10**9)


def exports(*versions: Version) -> list[LoraExport]:
    found = [version.lora for version in versions if version.lora is not None]
    assert len(found) == len(versions)
    return found


def test_logits_are_those_of_the_variant(pair: Pair, tmp_path: Path, open_version: Open, cache: LoraCache) -> None:
    """PEFT's own forward pass: the complement on a merged checkpoint, beside the variant on the base."""
    other = tmp_path / "other"
    save_adapter(tiny_llama(), other, seed=7, r=3, target_modules=["q_proj", "down_proj", "gate_proj"])
    own, resident = open_version(other), open_version(pair.adapter)
    merged = merge(pair.base, pair.adapter, tmp_path / "merged").output
    prompt = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted = unmerged(LlamaForCausalLM, pair.base, other)(prompt).logits
        base = LlamaForCausalLM.from_pretrained(pair.base, dtype=torch.float32)(prompt).logits
    for export, expected in ((exports(own)[0], wanted), (None, base)):
        made = complement_export(export, *exports(resident), digest="d" * 40, cache=cache)
        lease = cache.get(made.key, made.write)
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(merged, dtype=torch.float32), lease.folder)
        with torch.no_grad():
            found = model.eval()(prompt).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        lease.release()


def test_a_lora_adapter_of_peft(pair: Pair, tmp_path: Path, open_version: Open, cache: LoraCache) -> None:
    """With another scale and ranks by pattern: as LoRA of this package, every scale is 1."""
    torch.manual_seed(3)
    model = LlamaForCausalLM.from_pretrained(pair.base)
    config = LoraConfig(
        r=2, lora_alpha=7, target_modules=["v_proj", "up_proj"], rank_pattern={"up_proj": 5}, init_lora_weights=False
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "own")
    own, resident = open_version(tmp_path / "own"), open_version(pair.adapter)
    assert [export.rank for export in exports(own, resident)] == [5, 4]
    made = complement_export(*exports(own, resident), digest="d" * 40, cache=cache)
    folder = cache.get(made.key, made.write).folder
    merged = merge(pair.base, pair.adapter, tmp_path / "merged").output
    base, after = (load_file(path / "model.safetensors") for path in (pair.base, merged))
    alone = load_file(merge(pair.base, tmp_path / "own", tmp_path / "alone").output / "model.safetensors")
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in base:
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        added = torch.zeros(1)
        if f"{key}A.weight" in tensors:
            added = tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()
        torch.testing.assert_close((after[name] + added).float(), alone[name], rtol=0, atol=1e-6)
    saved = json.loads((folder / "adapter_config.json").read_text())
    ranks = {**dict.fromkeys(saved["target_modules"], saved["r"]), **saved["rank_pattern"]}
    assert set(ranks.values()) == {4, 5, 6}  # q_proj of the resident alone, up_proj of its own alone, v_proj of both
    assert saved["alpha_pattern"] == saved["rank_pattern"]
    assert saved["lora_alpha"] == saved["r"]


def test_every_pair_has_an_entry_of_its_own(pair: Pair, tmp_path: Path, open_version: Open, cache: LoraCache) -> None:
    save_adapter(tiny_llama(), tmp_path / "other", seed=5)
    one, two = exports(open_version(pair.adapter), open_version(tmp_path / "other"))
    half = exports(open_version(pair.adapter, "bf16"))[0]
    pairs = [(one, two, "a"), (two, one, "a"), (None, one, "a"), (None, two, "a"), (one, two, "b"), (half, two, "a")]
    keys = [complement_export(own, resident, digest, cache).key for own, resident, digest in pairs]
    assert len({*keys, one.key, two.key}) == len(pairs) + 2
    made = complement_export(one, two, "a" * 40, cache)
    with_lease = cache.get(made.key, made.write)
    manifest = json.loads((with_lease.folder / "peanut_manifest.json").read_text())
    assert manifest[RESIDENT] == "a" * 40
    found = cache.find(made.key)
    assert found is not None  # its hash is right
    (with_lease.folder / "adapter_model.safetensors").write_bytes(b"damaged")
    assert cache.find(made.key) is None
    with pytest.raises(OutputExistsError):
        made.write(with_lease.folder)


@pytest.mark.parametrize("key", ["target_parameters", "lora_bias", "modules_to_save"])
def test_what_has_no_complement_is_refused(
    pair: Pair, tmp_path: Path, open_version: Open, cache: LoraCache, key: str
) -> None:
    (export,) = exports(open_version(pair.adapter))
    folder = cache.get(export.key, export.write).folder
    edit_json(folder / "adapter_config.json", **{key: ["x"]})
    with pytest.raises(VariantError, match=rf"has {key} = \['x'\], so that it has no complement; expected plain"):
        write_complement(folder, into=tmp_path / "new", digest="d")
    assert not (tmp_path / "new").exists()


def test_merged_weights_are_those_of_the_same_theta(pair: Pair, open_version: Open) -> None:
    version = open_version(pair.adapter)
    base = open_checkpoint(pair.base)
    model = LoadedModel(base, [[name] for name in base.tensors])
    alone = adapter_version("v", pair.adapter, VersionOpener(model, "cpu"))
    assert version.merged is not None
    assert (version.merged.digest, version.merged.specs) == (alone.digest, alone.specs)
    assert version.digest != alone.digest
    found, expected = version.merged.evaluate(), alone.evaluate()
    assert found.digests == expected.digests
    found.close()
    expected.close()


def test_ranks_are_planned_for_pairs() -> None:
    assert [rank_of_pairs(ranks) for ranks in ({}, {"a": 8}, {"a": 8, "b": 40, "c": 16})] == [0, 8, 56]
    ranks = {"a": 8, "b": 40, "c": 16, "d": 60}
    assert unfit_pairs(ranks, 64) == [("d", "b"), ("d", "c"), ("d", "a")]
    assert unfit_pairs(ranks, 128) == []
