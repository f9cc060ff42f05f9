"""AdaMSS: clusters that are found again, with or without a bias, and those that are not those of the training."""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adamss.layer import Linear
from safetensors.torch import load_file
from support.damage import changed, without
from support.method_zoo import TARGETS
from support.peft_methods import MODELS, close, logits, reloaded, train
from support.tiny_models import edit_json, edit_weights, tiny_llama

from converters import Weighted, delta_weight, load_adapter, merge, prepare_merge
from converters.errors import BaseMismatchError, ConversionError, MissingDependencyError, OptionError, ThetaError
from converters.methods.spectral import adamss
from converters.methods.spectral.clusters import Clusters, Search, find_clusters
from converters.models.checkpoint import open_checkpoint
from converters.outputs.lora.plan import plan_lora_adapter
from converters.outputs.lora.write import write_lora_adapter
from converters.plans.merge import plan_merge


def config(model: str, **settings: Any) -> peft.AdamssConfig:
    return peft.AdamssConfig(**{"r": 8, "num_subspaces": 3, "target_modules": TARGETS[model], **settings})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    train(tiny_llama(), config("llama"), tmp_path / "base", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.slow
def test_a_bias_changes_too_also_as_lora(tmp_path: Path) -> None:
    train(MODELS["bert"](), config("bert"), tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    changes = {key for key in before if not torch.equal(before[key], after[key])}
    modules = set(load_adapter(tmp_path / "adapter").modules)
    assert changes == {f"{module}.{parameter}" for module in modules for parameter in ("weight", "bias")}
    versions = json.loads((tmp_path / "merged" / "peanut_manifest.json").read_text())["versions"]
    assert versions.keys() == {"python", "torch", "transformers", "safetensors", "scikit-learn"}
    wanted = logits(reloaded(MODELS["bert"](), tmp_path / "base", tmp_path / "adapter"))
    write_lora_adapter(plan_lora_adapter(prepare_merge(tmp_path / "base", tmp_path / "adapter"), tmp_path / "lora"))
    assert close(logits(reloaded(MODELS["bert"](), tmp_path / "base", tmp_path / "lora")), wanted)


@pytest.mark.slow
def test_a_base_in_half_precision(tmp_path: Path) -> None:
    """Its singular vectors were saved in it, too."""
    train(tiny_llama().bfloat16(), config("llama"), tmp_path / "base", tmp_path / "adapter")
    wanted = logits(reloaded(tiny_llama(), tmp_path / "base", tmp_path / "adapter"))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype="fp32")
    found = type(tiny_llama()).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert close(logits(found), wanted)


def test_a_weight_in_memory(tmp_path: Path, adapter: Path) -> None:
    """Without a bias, a weight says all; with one, it does not."""
    base = load_file(tmp_path / "base" / "model.safetensors")
    method = load_adapter(adapter).method("model.layers.0.self_attn.q_proj")
    w0 = base["model.layers.0.self_attn.q_proj.weight"].double()
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(w0 + delta_weight(w0, method), after.double(), atol=1e-7)
    with pytest.raises(ConversionError, match="needs that bias"):
        delta_weight(w0[:, :-1], method)


def test_another_base_of_the_same_shape(tmp_path: Path, adapter: Path) -> None:
    torch.manual_seed(7)
    tiny_llama().save_pretrained(tmp_path / "other")
    with pytest.raises(ConversionError, match="W0 has other singular vectors here than where"):
        merge(tmp_path / "other", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_without_the_biases(tmp_path: Path) -> None:
    settings = config("llama", target_modules=["q_proj"])
    train(tiny_llama(attention_bias=True), settings, tmp_path / "with", tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "without")
    merge(tmp_path / "with", tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(BaseMismatchError, match=r"in = 32 and no bias; θ was trained for 33 columns"):
        merge(tmp_path / "without", tmp_path / "adapter", tmp_path / "other")


def test_another_seed_and_clusters_of_other_sizes(tmp_path: Path, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", random_seed=1)
    with pytest.raises(ConversionError, match="other singular vectors"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")
    edit_json(adapter / "adapter_config.json", random_seed=0)

    def move_a_row(weights: dict[str, torch.Tensor]) -> None:
        one, other = (f"base_model.model.model.layers.0.self_attn.q_proj.adamss_B.{i}" for i in (0, 1))
        weights[other] = torch.cat([weights[other], weights[one][:1]])
        weights[one] = weights[one][1:].contiguous()

    edit_weights(adapter / "adapter_model.safetensors", move_a_row)
    with pytest.raises(ConversionError, match="W0 has clusters of other sizes here"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")


def test_without_the_extra(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'peanut-serve\[peft\]'"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")


@pytest.mark.parametrize(("shape", "r", "count"), [((48, 32), 8, 3), ((32, 48), 40, 5), ((4, 32), 8, 6)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_clusters_are_those_of_pefts_layer(shape: tuple[int, int], r: int, count: int, with_bias: bool) -> None:
    torch.manual_seed(5)
    module = torch.nn.Linear(shape[1], shape[0], bias=with_bias)
    settings = peft.AdamssConfig(r=r, num_subspaces=count, random_seed=3)
    layer = Linear(module, "default", r=r, config=settings)
    bias = module.bias.detach() if with_bias else None
    found = find_clusters(module.weight.detach(), bias, Search(r, count, 3))
    assert torch.equal(found.vectors, layer.adamss_newB["default"])
    assert torch.equal(found.rows, layer.scatter_index["default"])
    assert found.sizes == tuple(map(len, layer.adamss_B["default"].parameters()))


def test_pefts_layer_is_not_needed(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes longer than all else."""
    monkeypatch.setitem(sys.modules, "peft", None)
    assert merge(tmp_path / "base", adapter, tmp_path / "merged").verification is not None


def test_a_stream_is_not_enough(tmp_path: Path, adapter: Path) -> None:
    streamed = replace(open_checkpoint(tmp_path / "base"), stream=object())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="adamss reads weight and bias of a module together; leave out stream="):
        plan_merge(streamed, [Weighted(load_adapter(adapter))])


def test_several_threads_find_the_same_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random numbers of the process are seeded, and then left as they were."""
    torch.manual_seed(0)
    weights, search = torch.randn(40, 48, 32), Search(8, 3, 0)  # more than are kept
    wanted, state = [find_clusters(weight, None, search) for weight in weights], torch.get_rng_state()
    right = torch.svd_lowrank

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.005)  # between the seed and the first random number
        return right(*args, **options)

    monkeypatch.setattr(torch, "svd_lowrank", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda weight: find_clusters(weight, None, search), weights))
    assert all(torch.equal(one.rows, right.rows) for one, right in zip(found, wanted, strict=True))
    assert all(torch.equal(one.vectors, right.vectors) for one, right in zip(found, wanted, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_training_with_another_number_of_threads(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen with weights of real size: rounding moves rows to another cluster."""
    merge(tmp_path / "base", adapter, tmp_path / "wanted")
    tried = set()

    def moves_a_row(weight: torch.Tensor, bias: torch.Tensor | None, search: Search) -> Clusters:
        found = find_clusters(weight, bias, search)
        tried.add(search.threads)
        sizes = (found.sizes[0] + 1, found.sizes[1] - 1, *found.sizes[2:])
        return found if search.threads == 4 else replace(found, sizes=sizes)

    monkeypatch.setattr(adamss, "find_clusters", moves_a_row)
    merge(tmp_path / "base", adapter, tmp_path / "found")
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("wanted", "found"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert tried == {torch.get_num_threads(), 1, 2, 4}


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "half a cluster": (without("q_proj.adamss_A.1"), "has the parts A.0, A.2, B.0, B.1, B.2, newB; expected"),
    "no clusters": (
        lambda w: {k: t for k, t in w.items() if "q_proj.adamss_" not in k or "newB" in k},
        "expected newB",
    ),
    "a cluster less": (
        lambda w: {k: t for k, t in w.items() if "q_proj.adamss_A.2" not in k and "q_proj.adamss_B.2" not in k},
        "θ has 2 clusters, the config says num_subspaces = 3",
    ),
    "no vectors": (without("q_proj.adamss_newB"), "adamss_newB is missing"),
    "another rank": (changed("q_proj.adamss_newB", lambda t: t[1:]), "θ has r = 7, the config says r = 8"),
    "another A": (changed("q_proj.adamss_A.0", lambda t: t[:, 1:]), r"A.0 has shape \(1, 7\)"),
    "another B": (changed("q_proj.adamss_B.0", lambda t: t.repeat(1, 2)), r"A.0 has shape \(1, 8\), B.0 \(\d+, 2\)"),
    "a larger rank": (
        changed("q_proj.adamss_A.0", lambda t: t.repeat(2, 1)),
        "larger ranks than .* subspace_rank = 1",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_parts(adapter: Path, case: str) -> None:
    change, message = DAMAGES[case]
    edit_weights(adapter / "adapter_model.safetensors", change)
    with pytest.raises(ThetaError, match=message):
        load_adapter(adapter)
