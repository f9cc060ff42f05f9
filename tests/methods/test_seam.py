"""What every method promises (`converters/methods/base.py`), and that the least a method has to say is enough."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from support.method_samples import IN, OUT, SAMPLES
from support.peft_methods import MODELS, train
from torch import Tensor

from converters import Weighted, load_adapter, merge, prepare_merge
from converters.adapters.adapter import ModuleTheta
from converters.errors import ConversionError, ThetaError, VerificationError
from converters.methods.base import Method
from converters.methods.spectral import residual
from converters.methods.table import METHODS
from converters.methods.update import WholeUpdate
from converters.methods.weight_delta import Reads, WeightShape
from converters.outputs.checkpoint.recheck import check_against
from converters.outputs.lora import plan_lora_adapter

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Cubic(Method):
    """The least that a method has to say: `W = W0 + s · W0 W0ᵀ W0 / ‖W0‖²`, which reads all of W0."""

    name = "cubic"
    formula = "`W = W0 + s·W0·W0ᵀ·W0 / ‖W0‖²`"

    s: Tensor

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Cubic":
        return cls(parts["s"])

    @property
    def parts(self) -> dict[str, Tensor]:
        return {"s": self.s}

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    @property
    def weight_shape(self) -> WeightShape:
        return None, None

    @property
    def reads(self) -> Reads:
        return Reads.WHOLE

    def delta(self, w0: Tensor) -> Tensor:
        return self.s.sum() * (w0 @ w0.T @ w0) / w0.square().sum()


@pytest.fixture(params=[*SAMPLES, "the least"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Method:
    monkeypatch.setattr(residual, "LEAST_COSINE", -1.0)  # random numbers did not begin with parts of W0
    torch.manual_seed(0)
    return Cubic(torch.randn(2, 2)) if request.param == "the least" else SAMPLES[request.param]()


def test_every_method_is_tried_here() -> None:
    assert {SAMPLES[name]().name for name in SAMPLES} == set(METHODS)
    assert all(method.name == name for name, method in METHODS.items())


def test_what_the_documentation_says_of_ranks() -> None:
    for name, method in METHODS.items():
        ranks = [make().rank for make in SAMPLES.values() if make().name == name]
        assert any(ranks) == (method.lora_rank is not None)


def test_it_can_be_written_down_and_read_again(method: Method) -> None:
    settings = json.loads(json.dumps(method.settings))
    again = type(method).from_parts(method.parts, settings)
    w0 = torch.randn(OUT, IN)
    assert torch.equal(again.delta(w0), method.delta(w0))
    described = type(method).from_parts({k: v.to("meta") for k, v in method.parts.items()}, settings)
    assert (described.facts, described.rank, described.weight_shape) == (
        method.facts,
        method.rank,
        method.weight_shape,
    )
    json.dumps([method.facts, method.digest_facts, type(method).describe([method, again])])


def evaluated(delta: Any, w0: Tensor) -> Tensor:
    """`W0 + delta` by blocks, as a merge evaluates it."""
    update = delta.update((w0.shape[0], w0.shape[1]), torch.float64, CPU)
    blocks = [(4 * i, block) for i, block in enumerate(torch.split(w0, 4))]
    if update.needs_pass:
        for start, block in blocks:
            update.see(block.clone(), start)
        update.settle()
    return torch.cat([update.add_to(block.clone(), update.prepare(block.clone(), start)) for start, block in blocks])


@pytest.mark.parametrize("weight", [1.0, -0.3])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_blocks_samples_weights_and_transposed_weights(method: Method, weight: float, is_transposed: bool) -> None:
    """Everything says the same as the definition, `delta`."""
    w0 = torch.randn(OUT, IN).double()
    wanted = weight * method.to(CPU, torch.float64).delta(w0)
    delta = method.times(weight).to(CPU, torch.float64)
    if is_transposed:
        if method.name == "olora":
            with pytest.raises(ThetaError, match="OLoRA is not defined for weights that are stored transposed"):
                delta.transposed()
            return
        delta, w0, wanted = delta.transposed(), w0.T.contiguous(), wanted.T
    assert torch.allclose(delta.delta(w0), wanted, rtol=1e-11, atol=1e-12)
    assert torch.allclose(evaluated(delta, w0) - w0, wanted, rtol=1e-11, atol=1e-12)
    rows, columns = torch.tensor([0, 2, 5]), torch.tensor([1, 7])
    unread = torch.full((), torch.nan).double().expand(w0.shape)
    read = {Reads.ROWS: w0[rows], Reads.COLUMNS: w0[:, columns], Reads.WHOLE: w0, Reads.SHAPE: unread}
    found, spread = delta.delta_at(read.get(delta.reads, w0[rows][:, columns]), rows, columns)
    assert torch.allclose(found, wanted[rows][:, columns], rtol=1e-11, atol=1e-12)
    assert bool((spread >= found.abs() * (1 - 1e-9)).all())
    update = delta.update((w0.shape[0], w0.shape[1]), torch.float64, CPU)
    assert update.norm(lambda: torch.split(w0, 4)) == pytest.approx(float(wanted.norm()), rel=1e-9)
    if delta.rank is not None:
        assert delta.full_rank_reason is None
        factors = delta.update((w0.shape[0], w0.shape[1]), torch.float64, CPU).factors(torch.split(w0, 4))
        assert factors.up.shape[1] == delta.rank
        assert torch.allclose(factors.up @ factors.down, wanted, rtol=1e-11, atol=1e-12)
    else:
        assert delta.full_rank_reason


def test_reads_says_all_that_the_delta_depends_on(method: Method) -> None:
    """A number elsewhere in W0 changes nothing."""
    w0, delta = torch.randn(OUT, IN).double(), method.to(CPU, torch.float64)
    before = delta.delta(w0)
    changed = w0.clone()
    changed[4, 6] += 1
    touched = (delta.delta(changed) - before).abs() > 0
    touched[4, 6] = False
    if delta.reads in (Reads.NOTHING, Reads.ROWS):
        touched[4] &= delta.reads is Reads.NOTHING
    if delta.reads is Reads.COLUMNS:
        touched[:, 6] = False
    assert delta.reads is Reads.WHOLE or not touched.any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_least_is_enough_to_merge_sum_verify_and_recheck(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linear layers and Conv1D; evaluated as a whole, transposed and weighted by what every method inherits."""
    targets = ["q_proj", "down_proj"] if name == "llama" else ["c_attn", "c_fc"]
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    train(MODELS[name](), LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "gpt2"), base, adapter)
    opened = load_adapter(adapter)
    modules = {m: ModuleTheta(Cubic, {"s": t.parts["A"]}, {}, t.fan_in_fan_out) for m, t in opened.modules.items()}
    cubic = replace(opened, modules=modules)
    result = merge(base, [Weighted(cubic, 0.5), Weighted(opened, 2.0)], merged)
    assert result.verification is not None
    assert result.verification.max_ulp <= 0.5 + 2**-10
    checked = check_against(merged, result.plan)
    assert checked.recomputed == sum(
        load_file(merged / "model.safetensors")[t.name].numel() for t in updated(result.plan)
    )
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    for tensor in updated(result.plan):
        w0 = before[tensor.name].double()
        module = tensor.terms[0].module
        oriented = w0.T if name == "gpt2" else w0
        lora = opened.tweaker(module)
        wanted = oriented + 0.5 * cubic.method(module).to(CPU, torch.float64).delta(oriented)
        wanted = wanted + 2.0 * lora.scaling * lora.b.double() @ lora.a.double()
        found = after[tensor.name].double()
        assert torch.allclose(found.T if name == "gpt2" else found, wanted, rtol=1e-6, atol=1e-7)
    with pytest.raises(ConversionError, match="is not of low rank: it cannot be expressed as LoRA"):
        plan_lora_adapter(prepare_merge(base, cubic), tmp_path / "lora")
    right = WholeUpdate.prepare
    monkeypatch.setattr(WholeUpdate, "prepare", lambda self, w0, start: right(self, w0, start) * 1.001)
    with pytest.raises(VerificationError, match="recomputed numbers are wrong"):
        merge(base, cubic, tmp_path / "wrong")


def updated(plan: Any) -> list[Any]:
    return [tensor for tensor in plan.tensors if tensor.terms]
