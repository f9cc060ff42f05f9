"""DoRA, against HF PEFT's unmerged forward pass and its formula in float64."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from support.commands import Run
from support.peft_methods import MODELS, close, logits, reloaded, train
from support.tiny_models import edit_json, edit_weights

from converters import Weighted, load_adapter, merge, record_base
from converters.errors import AdapterConfigError, BaseMismatchError, ConversionError, ThetaError, VerificationError
from converters.methods.multiplicative.dora import Dora, DoraUpdate
from converters.methods.update import WholeUpdate
from converters.models.checkpoint import open_checkpoint

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "dense"],
}


def config(model: str, **changes: object) -> LoraConfig:
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "use_dora": True,
        "target_modules": TARGETS[model],
        "fan_in_fan_out": model == "gpt2",
        "modules_to_save": ["classifier"] if model == "bert" else None,
        "task_type": "SEQ_CLS" if model == "bert" else "CAUSAL_LM",
    }
    return LoraConfig(**{**settings, **changes})


@pytest.mark.parametrize("name", MODELS)
def test_merged_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """Linear layers, Conv1D, biases, a head."""
    model = MODELS[name]()
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    train(model, config(name), base, adapter)
    wanted = logits(reloaded(model, base, adapter))
    result = merge(base, adapter, merged)
    assert result.verification is not None
    assert result.verification.recomputed > 0
    found = logits(type(model).from_pretrained(merged, dtype=torch.float32).eval())
    assert close(found, wanted)
    assert not close(logits(type(model).from_pretrained(base, dtype=torch.float32).eval()), wanted)


def trained(tmp_path: Path, name: str = "llama", **changes: object) -> tuple[Path, Path]:
    train(MODELS[name](), config(name, **changes), tmp_path / "base", tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_weights_are_the_formula_in_float64(tmp_path: Path, name: str, use_rslora: bool) -> None:
    base, adapter = trained(tmp_path, name, use_rslora=use_rslora)
    opened = load_adapter(adapter)
    before = load_file(base / "model.safetensors")
    for module in opened.modules:
        theta = opened.method(module)
        assert isinstance(theta, Dora)
        key = next(key for key in before if key.endswith(f"{module.removeprefix('transformer.')}.weight"))
        stored = before[key].double()
        w0 = stored.T if name == "gpt2" else stored
        s = 6 / 4**0.5 if use_rslora else 6 / 4
        updated = w0 + s * theta.b.double() @ theta.a.double()
        wanted = theta.magnitude.double()[:, None] * updated / updated.square().sum(1).sqrt()[:, None]
        delta = (theta.transposed() if name == "gpt2" else theta).to("cpu", torch.float64).delta(stored)
        found = (stored + delta).T if name == "gpt2" else stored + delta
        assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()


@pytest.mark.parametrize("is_transposed", [False, True])
def test_blocks_give_the_whole_delta(is_transposed: bool) -> None:
    torch.manual_seed(0)
    theta = Dora(torch.randn(3, 14), torch.randn(10, 3), torch.rand(10) + 0.5, 0.7).to("cpu", torch.float64)
    theta = theta.transposed() if is_transposed else theta
    w0 = torch.randn(14, 10).double() if is_transposed else torch.randn(10, 14).double()
    shape = (w0.shape[0], w0.shape[1])
    update = theta.update(shape, torch.float64, torch.device("cpu"))
    assert isinstance(update, DoraUpdate)  # in bounded memory, not as a whole
    assert not isinstance(update, WholeUpdate)
    wanted, blocks = theta.delta(w0), torch.split(w0, 4)
    if update.needs_pass:
        for i, block in enumerate(blocks):
            update.see(block, 4 * i)
        update.settle()
    found = torch.cat([update.add_to(torch.zeros_like(b), update.prepare(b, 4 * i)) for i, b in enumerate(blocks)])
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-13)
    rows, columns = torch.tensor([1, 5]), torch.tensor([0, 3, 9])
    picked = w0[:, columns] if is_transposed else w0[rows]
    assert torch.allclose(theta.delta_at(picked, rows, columns)[0], wanted[rows][:, columns], rtol=1e-12, atol=1e-13)


def test_a_wrong_norm_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = trained(tmp_path)
    right = DoraUpdate.prepare
    monkeypatch.setattr(DoraUpdate, "prepare", lambda self, w0, start: right(self, w0, start) * 1.0001)
    with pytest.raises(VerificationError, match="recomputed numbers are wrong"):
        merge(base, adapter, tmp_path / "merged")


def test_a_sum_multiplies_the_delta(tmp_path: Path) -> None:
    """Half a DoRA and a quarter of another, from the same W0."""
    base, first = trained(tmp_path)
    train(MODELS["llama"](), config("llama", r=2), tmp_path / "other", tmp_path / "second", seed=5)
    merge(
        base,
        [Weighted(load_adapter(first), 0.5), Weighted(load_adapter(tmp_path / "second"), 0.25)],
        tmp_path / "sum",
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "sum"))
    key = "model.layers.1.mlp.down_proj.weight"
    w0 = before[key].double()
    deltas = [
        load_adapter(folder).method(key.removesuffix(".weight")).to("cpu", torch.float64).delta(w0)
        for folder in (first, tmp_path / "second")
    ]
    assert torch.equal(after[key], (w0 + 0.5 * deltas[0] + 0.25 * deltas[1]).float())


def test_it_cannot_be_expressed_as_lora(tmp_path: Path, run_here: Run) -> None:
    base, adapter = trained(tmp_path)
    done = run_here("peanut-merge", "--base", base, "--adapter", adapter, "--format", "lora", "-o", tmp_path / "lora")
    assert done.returncode == 1
    assert "divides every row by its norm (DoRA)" in done.stderr
    assert "cannot be expressed as LoRA; merge it" in done.stderr
    done = run_here("peanut-merge", "--base", base, "--adapter", adapter, "--format", "peft", "-o", tmp_path / "peft")
    assert "this is a dora adapter; the peft format writes PEANuT adapters" in done.stderr
    with pytest.raises(ConversionError, match="it has no factors; use delta_weight"):
        from converters import factors

        factors(torch.randn(32, 32), load_adapter(adapter).method("model.layers.0.self_attn.q_proj"))


def test_it_resumes_verifies_and_is_described(tmp_path: Path, run_here: Run) -> None:
    base, adapter = trained(tmp_path)
    assert record_base(load_adapter(adapter), open_checkpoint(base)).exists()
    for output, options in (("merged", ()), ("resumed", ("--resume",))):
        done = run_here("peanut-merge", "--base", base, "--adapter", adapter, "-o", tmp_path / output, *options)
        assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / output / "model.safetensors").read_bytes() for output in ("merged", "resumed"))
    assert one == two
    full = ("--verify", "--full", "--base", base, "--adapter", adapter)
    assert run_here("peanut-inspect", tmp_path / "merged", *full).returncode == 0
    shown = run_here("peanut-inspect", adapter, "--base", base)
    assert shown.returncode == 0, shown.stderr
    assert "dora" in shown.stdout
    assert "magnitude_vector" in shown.stdout
    assert "DoRA" in (tmp_path / "merged" / "README.md").read_text()


def test_config_and_weights_have_to_agree(tmp_path: Path) -> None:
    _, adapter = trained(tmp_path)
    edit_json(adapter / "adapter_config.json", use_dora=False)
    with pytest.raises(AdapterConfigError, match="use_dora is off, but the weights contain"):
        load_adapter(adapter)
    edit_json(adapter / "adapter_config.json", use_dora=True)
    edit_weights(
        adapter / "adapter_model.safetensors",
        lambda weights: {k: v for k, v in weights.items() if "layers.1.self_attn.v_proj.lora_magnitude" not in k},
    )
    with pytest.raises(ThetaError, match=r"layers\.1\.self_attn\.v_proj: lora_magnitude_vector is missing"):
        load_adapter(adapter)


def test_another_base_is_refused(tmp_path: Path) -> None:
    from support.tiny_models import tiny_llama

    _, adapter = trained(tmp_path)
    tiny_llama(hidden_size=48, intermediate_size=40).save_pretrained(tmp_path / "larger")
    with pytest.raises(BaseMismatchError, match="θ was trained for out = 32 x in = 72"):
        merge(tmp_path / "larger", adapter, tmp_path / "merged")
