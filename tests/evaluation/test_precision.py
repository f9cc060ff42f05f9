"""What is evaluated in float32: only what is costly, only for outputs of 16 bits, and still verified."""

from pathlib import Path

import pytest
import torch
from peft import RandLoraConfig
from safetensors.torch import load_file
from support.method_samples import SAMPLES
from support.peft_methods import MODELS, train

from converters import load_adapter, merge
from converters.errors import VerificationError
from converters.evaluation.precision import dtype_of
from converters.methods.dense.randlora import RandLora
from converters.plans.placed import Placed


def test_what_is_evaluated_in_float32() -> None:
    costly, other = SAMPLES["randlora"](), SAMPLES["hira"]()
    for dtype, wanted in (("BF16", torch.float32), ("F16", torch.float32), ("F32", torch.float64)):
        seen = [costly, costly.times(0.5), costly.transposed().times(0.5), Placed(costly, 2, 12, 14)]
        assert {dtype_of(delta, dtype) for delta in seen} == {wanted}
        assert dtype_of(other, dtype) is torch.float64


@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_costly_products_for_16_bits(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to the float64 value as float32 products allow; in float32, rounded once."""
    targets = ["q_proj", "down_proj"] if model == "llama" else ["c_attn", "mlp.c_proj"]
    config = RandLoraConfig(r=4, target_modules=targets, fan_in_fan_out=model == "gpt2")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    train(MODELS[model](), config, base, adapter)
    before, opened = load_file(base / "model.safetensors"), load_adapter(adapter)
    for dtype in ("fp32", "bf16"):
        result = merge(base, adapter, tmp_path / dtype, dtype=dtype)
        after = load_file(tmp_path / dtype / "model.safetensors")
        for tensor in result.plan.tensors:
            for term in tensor.terms:
                method = opened.method(term.module).to("cpu", torch.float64)
                w0 = before[tensor.name].double()
                exact = w0 + (method.transposed() if term.transposed else method).delta(w0)
                unit = torch.finfo(after[tensor.name].dtype).eps * 2 ** exact.abs().log2().floor()
                error = (after[tensor.name].double() - exact).abs()
                product = (exact - w0).abs().max() * 2**-17 * (dtype == "bf16")  # some hundred terms in float32
                allowed = 0.5 * (1 + 1e-6) * unit + product
                assert bool((error <= allowed).all()), (error / allowed).max()
    right = RandLora.rows
    monkeypatch.setattr(RandLora, "rows", lambda self, w0, which: right(self, w0, which) * 1.002)
    with pytest.raises(VerificationError, match="recomputed numbers are wrong"):
        merge(base, adapter, tmp_path / "wrong", dtype="bf16")
