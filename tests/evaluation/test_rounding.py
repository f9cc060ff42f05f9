"""Numbers: one rounding, checked element by element against a float64 reference; dtypes of the output."""

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.rounding import excess
from support.tiny_models import Pair, tiny_llama

from converters import load_adapter, merge
from converters.errors import NonFiniteError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def reference(pair: Pair, module: str) -> torch.Tensor:
    """W0 + f(W0; θ) in float64, written out."""
    adapter = load_adapter(pair.adapter)
    theta, act = adapter.tweaker(module), torch.nn.functional.silu
    w0 = load_file(pair.base / "model.safetensors")[f"{module}.weight"].double()
    h = act(theta.a.double() @ w0)
    first = h
    h = act(theta.encoders[0].double() @ h)
    h = act(theta.decoders[0].double() @ h) + first
    return w0 + 0.5 * theta.b.double() @ h


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("option", ["auto", *DTYPES])
def test_merged_weights_are_the_rounded_float64_reference(
    make_pair: Callable[..., Pair], base_dtype: str, option: str
) -> None:
    model = tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    pair = make_pair(model, DTYPES[base_dtype], r=16, depth=1, act_fn="silu", target_modules=targets)
    result = merge(pair.base, pair.adapter, pair.output, dtype=option)
    expected_dtype = DTYPES[base_dtype if option == "auto" else option]
    merged = load_file(pair.output / "model.safetensors")
    assert {t.dtype for t in merged.values()} == {expected_dtype}
    updated = [t for t in result.plan.tensors if t.terms]
    assert len(updated) == 5
    for tensor in updated:
        off = excess(merged[tensor.name], reference(pair, tensor.terms[0].module))
        assert (off == 0).double().mean() >= 0.999
        assert off.max() <= 2.0**-10  # a neighbour as near: torch casts by way of float32
    config = json.loads((pair.output / "config.json").read_text())
    assert config["dtype"] == str(expected_dtype).removeprefix("torch.")
    assert result.verification.max_ulp <= 0.5 + 2.0**-11


def test_untouched_tensors_are_copied_byte_for_byte(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(dtype=torch.bfloat16)
    file = pair.base / "model.safetensors"
    weights = load_file(file)
    weights["extra.table"] = torch.arange(7)  # not floating: no cast touches it
    weights["extra.flag"] = torch.tensor([True, False, True])
    weights["extra.scalar"] = torch.tensor(3.5)
    save_file(weights, file, metadata={"format": "pt", "note": "kept"})
    result = merge(pair.base, pair.adapter, pair.output)
    merged = load_file(pair.output / "model.safetensors")
    assert set(merged) == set(weights)
    updated = {t.name for t in result.plan.tensors if t.terms}
    for name in set(weights) - updated:
        assert merged[name].dtype == weights[name].dtype
        assert torch.equal(merged[name], weights[name])
    for name in updated:
        assert not torch.equal(merged[name], weights[name])
    from safetensors import safe_open

    with safe_open(pair.output / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}


def test_a_cast_leaves_integers_alone(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    file = pair.base / "model.safetensors"
    save_file({**load_file(file), "extra.table": torch.arange(7)}, file, metadata={"format": "pt"})
    merge(pair.base, pair.adapter, pair.output, dtype="bf16")
    merged = load_file(pair.output / "model.safetensors")
    assert merged["extra.table"].dtype is torch.int64
    assert merged["lm_head.weight"].dtype is torch.bfloat16


def test_float64_weights_are_evaluated_in_float64(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(dtype=torch.float64, depth=1, act_fn="silu")
    result = merge(pair.base, pair.adapter, pair.output)
    module = next(t.terms[0].module for t in result.plan.tensors if t.terms)
    found = load_file(pair.output / "model.safetensors")[f"{module}.weight"]
    exact = reference(pair, module)
    assert found.dtype is torch.float64
    assert (found - exact).norm() <= 1e-14 * exact.norm()


@pytest.mark.parametrize("touched", [True, False])
def test_what_overflows_fp16_is_refused(make_pair: Callable[..., Pair], touched: bool) -> None:
    pair = make_pair(dtype=torch.bfloat16)
    file = pair.base / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.self_attn.v_proj.weight" if touched else "model.norm.weight"
    weights[name].view(-1)[0] = 1e6
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=rf"{name}: merged weights do not fit F16 .* dtype='bf16'"):
        merge(pair.base, pair.adapter, pair.output, dtype="fp16")
    assert sorted(p.name for p in pair.output.parent.iterdir()) == ["adapter", "base"]


def test_an_infinity_of_the_base_stays_one(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    file = pair.base / "model.safetensors"
    weights = {**load_file(file), "extra.mask": torch.tensor([0.0, float("-inf")])}
    save_file(weights, file, metadata={"format": "pt"})
    merge(pair.base, pair.adapter, pair.output, dtype="fp16")
    assert load_file(pair.output / "model.safetensors")["extra.mask"].tolist() == [0.0, float("-inf")]
